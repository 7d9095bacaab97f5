"""The model families: how a Hugging Face configuration and its tensors read in Megatron."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_fp16rl.weights.layouts import (
    Cut,
    GatedRows,
    QueryKeyValue,
    Replicated,
    Shapes,
    Vocabulary,
)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of; {} is the layer."""

    megatron: str
    hf: tuple[str, ...]
    layout: object


@dataclass(frozen=True)
class Family:
    """rules: the mapping table; unsupported: (what, test of the config) that must not hold."""

    rules: tuple[Rule, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    unsupported: tuple[tuple[str, Callable[[object], bool]], ...] = ()

    def find(self, megatron_name: str) -> tuple[tuple[str, ...], object]:
        """Hugging Face names and layout of a parameter, its layer counted over all stages.

        Names of Transformer Engine's layers, which hold the norm inside the next linear, are read
        as those of the local layers. Raises KeyError for a parameter outside the table.
        """
        name = _TE_NORMS.sub(lambda m: _LOCAL_NORMS[m[1]], megatron_name)
        layer = re.search(r"\.layers\.(\d+)\.", name)
        template = name.replace(layer[0], ".layers.{}.", 1) if layer else name
        for rule in self.rules:
            if rule.megatron == template:
                return tuple(
                    n.format(*layer.groups() if layer else ()) for n in rule.hf
                ), rule.layout
        raise KeyError(f"no rule maps Megatron's parameter {megatron_name}")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that building and converting one model needs to know."""

    family: Family
    transformer: dict[str, object]  # for Megatron's TransformerConfig
    shapes: Shapes
    tied: bool  # output layer is the embedding
    rope_base: float
    rope_scaling_factor: float | None  # Llama 3's scaling, or None
    max_positions: int


_LOCAL_NORMS = {
    "self_attention.linear_qkv": "input_layernorm.weight",
    "mlp.linear_fc1": "pre_mlp_layernorm.weight",
}
_TE_NORMS = re.compile(r"(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_weight")

_LAYER, _HF_LAYER = "decoder.layers.{}.", "model.layers.{}."


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv")


_DENSE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Rule(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), Replicated()),
    Rule(_LAYER + "self_attention.linear_qkv.weight", _qkv("weight"), QueryKeyValue()),
    Rule(
        _LAYER + "self_attention.linear_proj.weight",
        (_HF_LAYER + "self_attn.o_proj.weight",),
        Cut(1),
    ),
    Rule(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        GatedRows(),
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), Cut(1)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
_QKV_BIAS = (Rule(_LAYER + "self_attention.linear_qkv.bias", _qkv("bias"), QueryKeyValue()),)
_QK_NORM = tuple(
    Rule(
        f"{_LAYER}self_attention.{x}_layernorm.weight",
        (f"{_HF_LAYER}self_attn.{x}_norm.weight",),
        Replicated(),
    )
    for x in "qk"
)

_ATTENTION_BIAS = ("attention_bias", lambda config: bool(config.attention_bias))
_SLIDING_WINDOW = ("use_sliding_window", lambda config: bool(config.use_sliding_window))

FAMILIES = {
    "llama": Family(
        _DENSE,
        unsupported=(_ATTENTION_BIAS, ("mlp_bias", lambda config: bool(config.mlp_bias))),
    ),
    "qwen2": Family(_DENSE + _QKV_BIAS, qkv_bias=True, unsupported=(_SLIDING_WINDOW,)),
    "qwen3": Family(
        _DENSE + _QK_NORM, qk_norm=True, unsupported=(_ATTENTION_BIAS, _SLIDING_WINDOW)
    ),
}


def describe(config: object, tensor_parallel: int) -> ModelSpec:
    """Reads a transformers configuration.

    Raises ValueError, naming the key, where Megatron would compute something else than it says.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    for key, holds in family.unsupported:
        if holds(config):
            raise ValueError(f"{key} of this {config.model_type} model is not supported")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r} is not supported; only 'silu'")
    rope_base, rope_factor = _rope(config.rope_parameters)
    heads = config.num_attention_heads
    shapes = Shapes(
        heads=heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        padded_vocabulary=-(-config.vocab_size // tensor_parallel) * tensor_parallel,
    )
    return ModelSpec(
        family=family,
        transformer={
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": heads,
            "num_query_groups": shapes.groups,
            "kv_channels": shapes.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.rms_norm_eps,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": family.qkv_bias,
            "qk_layernorm": family.qk_norm,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        shapes=shapes,
        tied=bool(config.tie_word_embeddings),
        rope_base=rope_base,
        rope_scaling_factor=rope_factor,
        max_positions=config.max_position_embeddings,
    )


def _rope(parameters: dict[str, object]) -> tuple[float, float | None]:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return parameters["rope_theta"], None
    if kind == "llama3":  # Megatron fixes the other three numbers (rotary_pos_emb.py, 0.16.1)
        fixed = {
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        }
        for key, value in fixed.items():
            if parameters[key] != value:
                raise ValueError(
                    f"rope_parameters.{key}={parameters[key]}: only {value} is supported"
                )
        return parameters["rope_theta"], parameters["factor"]
    raise ValueError(f"rope_type={kind!r} is not supported; supported: 'default', 'llama3'")
