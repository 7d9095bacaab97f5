"""The model families: how a Hugging Face configuration and its tensors read in Megatron."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.recipe import Layout, RecipeError
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
    moe: Callable[[object], dict[str, object]] | None = None  # config -> TransformerConfig values
    unsupported: tuple[tuple[str, Callable[[object], bool]], ...] = ()

    def find(self, megatron_name: str) -> Rule:
        """The rule of a parameter, with its layer (and expert) filled in.

        The name counts layers over all stages and experts over all ranks. Names of Transformer
        Engine's layers (the norm inside the next linear, experts in one module) are read as those of
        the local layers. Raises KeyError for a parameter outside the table.
        """
        name = _TE_NORMS.sub(lambda m: _LOCAL_NORMS[m[1]], megatron_name)
        name = _TE_EXPERTS.sub(r"experts.local_experts.\2.\1.weight", name)
        numbers = re.findall(r"\.(\d+)\.", name)
        template = re.sub(r"\.\d+\.", ".{}.", name)
        for rule in self.rules:
            if rule.megatron == template:
                return Rule(name, tuple(n.format(*numbers) for n in rule.hf), rule.layout)
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


@dataclass(frozen=True)
class Routing:
    """What a mixture of experts chooses for a token: `top_k` of `experts`, in each sparse layer."""

    sparse: tuple[bool, ...]  # of each layer
    top_k: int
    experts: int


_LOCAL_NORMS = {
    "self_attention.linear_qkv": "input_layernorm.weight",
    "mlp.linear_fc1": "pre_mlp_layernorm.weight",
}
_TE_NORMS = re.compile(r"(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_weight")
_TE_EXPERTS = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)")

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

_MLP, _EXPERT = _HF_LAYER + "mlp.", _HF_LAYER + "mlp.experts.{}."
_MOE = (
    Rule(_LAYER + "mlp.router.weight", (_MLP + "gate.weight",), Replicated()),
    Rule(
        _LAYER + "mlp.experts.local_experts.{}.linear_fc1.weight",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        GatedRows(),
    ),
    Rule(
        _LAYER + "mlp.experts.local_experts.{}.linear_fc2.weight",
        (_EXPERT + "down_proj.weight",),
        Cut(1),
    ),
)
_SHARED_EXPERT = (
    Rule(
        _LAYER + "mlp.shared_experts.gate_weight",
        (_MLP + "shared_expert_gate.weight",),
        Replicated(),
    ),
    Rule(
        _LAYER + "mlp.shared_experts.linear_fc1.weight",
        (_MLP + "shared_expert.gate_proj.weight", _MLP + "shared_expert.up_proj.weight"),
        GatedRows(),
    ),
    Rule(
        _LAYER + "mlp.shared_experts.linear_fc2.weight",
        (_MLP + "shared_expert.down_proj.weight",),
        Cut(1),
    ),
)


def _qwen_moe(config: object) -> dict[str, object]:
    """Qwen2- and Qwen3-MoE: softmax over all experts, then the best k, renormalised or not."""
    sparse = [
        int(i not in (config.mlp_only_layers or []) and (i + 1) % config.decoder_sparse_step == 0)
        for i in range(config.num_hidden_layers)
    ]
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": sparse,
        # Softmax over the best k alone is softmax over all, renormalised over the best k.
        "moe_router_pre_softmax": not config.norm_topk_prob,
    }


def _qwen2_moe(config: object) -> dict[str, object]:
    return {
        **_qwen_moe(config),
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    }


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
    "qwen2_moe": Family(
        _DENSE + _QKV_BIAS + _MOE + _SHARED_EXPERT,
        qkv_bias=True,
        moe=_qwen2_moe,
        unsupported=(_SLIDING_WINDOW,),
    ),
    "qwen3_moe": Family(
        _DENSE + _QK_NORM + _MOE,
        qk_norm=True,
        moe=_qwen_moe,
        unsupported=(_ATTENTION_BIAS, _SLIDING_WINDOW),
    ),
}
_MOE_DEFAULTS = {
    "moe_router_dtype": "fp32",  # in fp16 the choice of experts depends on the last bit
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}


def load_config(folder: str | Path) -> object:
    """The transformers configuration of a folder. Raises RecipeError where there is none."""
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").exists():
        raise RecipeError(f"{folder} has no config.json: it is not a Hugging Face folder")
    return AutoConfig.from_pretrained(folder)


def describe(config: object, layout: Layout) -> ModelSpec:
    """Reads a transformers configuration.

    Raises RecipeError, naming the key, where Megatron would compute something else than it says, or
    where the layout does not divide the model.
    """
    if config.model_type not in FAMILIES:
        raise RecipeError(
            f"model_type={config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    for key, holds in family.unsupported:
        if holds(config):
            raise RecipeError(f"{key} of this {config.model_type} model is not supported")
    if config.hidden_act != "silu":
        raise RecipeError(f"hidden_act={config.hidden_act!r} is not supported; only 'silu'")
    rope_base, rope_factor = _rope(config.rope_parameters)
    heads = config.num_attention_heads
    shapes = Shapes(
        heads=heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        padded_vocabulary=-(-config.vocab_size // layout.tensor_parallel) * layout.tensor_parallel,
    )
    moe = {**_MOE_DEFAULTS, **family.moe(config)} if family.moe else {}
    _check_layout(config, layout, shapes, moe)
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
            **moe,
        },
        shapes=shapes,
        tied=bool(config.tie_word_embeddings),
        rope_base=rope_base,
        rope_scaling_factor=rope_factor,
        max_positions=config.max_position_embeddings,
    )


def routing(config: object) -> Routing:
    """How a model chooses its experts. Raises RecipeError if it has none."""
    moe = FAMILIES[config.model_type].moe
    if moe is None:
        raise RecipeError(
            f"rollout.router_replay: this {config.model_type} model has no experts; set it to false"
        )
    values = moe(config)
    return Routing(
        sparse=tuple(map(bool, values["moe_layer_freq"])),
        top_k=values["moe_router_topk"],
        experts=values["num_moe_experts"],
    )


def _check_layout(config: object, layout: Layout, shapes: Shapes, moe: dict[str, object]) -> None:
    stages = layout.pipeline_parallel * layout.model_chunks
    wanted = [
        ("num_key_value_heads", shapes.groups, "tensor_parallel", layout.tensor_parallel),
        ("num_attention_heads", shapes.heads, "tensor_parallel", layout.tensor_parallel),
        ("intermediate_size", config.intermediate_size, "tensor_parallel", layout.tensor_parallel),
        ("num_hidden_layers", config.num_hidden_layers, "pipeline_parallel x model_chunks", stages),
    ]
    if moe:
        wanted += [
            ("num_experts", moe["num_moe_experts"], "expert_parallel", layout.expert_parallel),
            (
                "moe_intermediate_size",
                moe["moe_ffn_hidden_size"],
                "expert_tensor_parallel",
                layout.expert_tensor_parallel,
            ),
        ]
        if layout.tensor_parallel > 1 and not layout.sequence_parallel:
            raise RecipeError(
                f"learner.tensor_parallel={layout.tensor_parallel} of a MoE model needs "
                "learner.sequence_parallel: true (Megatron-core refuses it otherwise)"
            )
        if layout.expert_parallel == 1 and layout.expert_tensor_parallel != layout.tensor_parallel:
            raise RecipeError(
                f"learner.tensor_parallel={layout.tensor_parallel} and expert_tensor_parallel="
                f"{layout.expert_tensor_parallel} differ, and expert_parallel=1: Megatron-core would "
                "then sum the experts' gradients over the wrong ranks, and replicas of an expert would "
                f"drift apart; set expert_tensor_parallel: {layout.tensor_parallel}, or "
                "expert_parallel > 1"
            )
    elif layout.expert_parallel > 1 or layout.expert_tensor_parallel > 1:
        raise RecipeError(
            f"learner.expert_parallel={layout.expert_parallel}, expert_tensor_parallel="
            f"{layout.expert_tensor_parallel}: this {config.model_type} model has no experts"
        )
    for key, number, by, parts in wanted:
        if number % parts:
            good = [n for n in range(1, number + 1) if number % n == 0]
            nearest = sorted(sorted(good, key=lambda n: abs(n - parts))[:3])
            raise RecipeError(
                f"learner.{by}={parts} does not divide the model's {key}={number}; nearest that do: "
                f"{', '.join(map(str, nearest))}"
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
                raise RecipeError(
                    f"rope_parameters.{key}={parameters[key]}: only {value} is supported"
                )
        return parameters["rope_theta"], parameters["factor"]
    raise RecipeError(f"rope_type={kind!r} is not supported; supported: 'default', 'llama3'")
