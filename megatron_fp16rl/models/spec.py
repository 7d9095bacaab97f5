"""What a model's configuration means in Megatron: its shapes, options, experts, and possible layouts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_fp16rl.models.families import FAMILIES, Family
from megatron_fp16rl.models.families.blocks import ALWAYS_FP32
from megatron_fp16rl.models.layouts import DeltaShapes, Shapes
from megatron_fp16rl.recipe import Layout, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOE_DEFAULTS = {
    "moe_router_dtype": "fp32",  # in fp16 the choice of experts depends on the last bit
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}


@dataclass(frozen=True)
class ModelSpec:
    """Everything that building and converting one model needs to know."""

    family: Family
    transformer: dict[str, Any]  # for Megatron's TransformerConfig
    yarn: dict[str, Any]  # attributes that Megatron reads beside it, of a model with YaRN
    shapes: Shapes
    tied: bool  # output layer is the embedding
    rope_base: float
    rope_scaling_factor: float | None  # Llama 3's scaling, or None
    rope_fraction: float  # of a head's dimensions that are rotated
    max_positions: int
    mtp_layers: int  # layers of multi-token prediction after the last; not trained, not exported

    @property
    def latent_attention(self) -> bool:
        return "kv_lora_rank" in self.transformer


@dataclass(frozen=True)
class Routing:
    """What a mixture of experts chooses for a token: `top_k` of `experts`, in each sparse layer."""

    sparse: tuple[bool, ...]  # of each layer
    top_k: int
    experts: int


def family_of(config: "PretrainedConfig") -> Family:
    """The family of a transformers configuration. Raises RecipeError if it is not supported."""
    if config.model_type not in FAMILIES:
        raise RecipeError(
            f"model_type={config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def served_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a server of `dtype` takes a Hugging Face tensor."""
    return torch.float32 if name.endswith(ALWAYS_FP32) else dtype


def describe(config: "PretrainedConfig", layout: Layout) -> ModelSpec:
    """Reads a transformers configuration.

    Raises RecipeError, naming the key, where Megatron would compute something else, or where the layout
    does not divide the model.
    """
    family = family_of(config)
    _check_supported(config, family)  # first: of such a model a family may not have the options
    options = {"add_qkv_bias": False, "qk_layernorm": False, **family.options(config)}
    _check_layers(config, options)
    yarn = {key: options.pop(key) for key in list(options) if key.startswith("yarn_")}
    is_moe = "num_moe_experts" in options
    latent = "kv_lora_rank" in options
    rope_base, rope_factor = _rope(config.rope_parameters, latent, bool(yarn))
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    heads, tensor_parallel = config.num_attention_heads, layout.tensor_parallel
    shapes = Shapes(
        heads=heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        padded_vocabulary=-(-config.vocab_size // tensor_parallel) * tensor_parallel,
        delta=_delta_shapes(options),
    )
    _check_layout(config, layout, shapes, options if is_moe else {})
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
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **(_MOE_DEFAULTS if is_moe else {}),
            **options,
        },
        yarn=yarn,
        shapes=shapes,
        tied=bool(config.tie_word_embeddings),
        rope_base=rope_base,
        rope_scaling_factor=rope_factor,
        rope_fraction=partial if family.partial_rotary else 1.0,
        max_positions=config.max_position_embeddings,
        mtp_layers=getattr(config, "num_nextn_predict_layers", None) or 0,
    )


def _check_supported(config: "PretrainedConfig", family: Family) -> None:
    """Raises RecipeError, naming the key, where Megatron would compute something else."""
    for key, holds in family.unsupported:
        if holds(config):
            raise RecipeError(f"{key} of this {config.model_type} model is not supported")
    if config.hidden_act != "silu":
        raise RecipeError(f"hidden_act={config.hidden_act!r} is not supported; only 'silu'")
    if (method := _quantised(config)) is not None and method != family.quantised:
        raise RecipeError(
            "quantization_config is not supported: convert the weights to bf16 or fp16 first"
        )


def _check_layers(config: "PretrainedConfig", options: dict[str, Any]) -> None:
    """Raises RecipeError for kinds of layers that the family's options do not make."""
    known = {"full_attention"} | ({"sliding_attention"} if "window_size" in options else set())
    known |= {"linear_attention"} if "linear_attention_freq" in options else set()
    if kinds := set(getattr(config, "layer_types", None) or ()) - known:
        raise RecipeError(f"layer_types: {', '.join(sorted(map(str, kinds)))} is not supported")


def _delta_shapes(options: dict[str, Any]) -> DeltaShapes | None:
    if "linear_attention_freq" not in options:
        return None
    return DeltaShapes(
        key_heads=options["linear_num_key_heads"],
        value_heads=options["linear_num_value_heads"],
        key_dim=options["linear_key_head_dim"],
        value_dim=options["linear_value_head_dim"],
    )


def check_served(config: "PretrainedConfig", dtype: str | None = None) -> None:
    """Raises RecipeError for a model that SGLang 0.5.23 would silently serve wrongly, or not in a server's dtype.

    dtype: as torch names it; None: not known.
    """
    family = family_of(config)
    family.check_served(config)
    saved = str(config.dtype).removeprefix("torch.")
    if family.served_as_saved and dtype is not None and saved != dtype:
        raise RecipeError(
            f"dtype={saved}, but servers run in {dtype}, and SGLang makes a {config.model_type} model's weights in "
            f'the former: set "dtype": "{dtype}" in config.json'
        )


def routing(config: "PretrainedConfig") -> Routing:
    """How a model chooses its experts. Raises RecipeError if it has none."""
    options = family_of(config).options(config)
    if "num_moe_experts" not in options:
        raise RecipeError(
            f"rollout.router_replay: this {config.model_type} model has no experts; set it to false"
        )
    return Routing(
        sparse=tuple(map(bool, options["moe_layer_freq"])),
        top_k=options["moe_router_topk"],
        experts=options["num_moe_experts"],
    )


def _quantised(config: "PretrainedConfig") -> str | None:
    """The quant_method of a configuration; None if its weights are not quantised."""
    values = getattr(config, "quantization_config", None)
    return str(values.get("quant_method")) if values else None


def _check_layout(
    config: "PretrainedConfig", layout: Layout, shapes: Shapes, moe: dict[str, Any]
) -> None:
    """Raises RecipeError where a parallel size does not divide what it cuts. moe: options, if any."""
    layers, stages = config.num_hidden_layers, layout.pipeline_parallel * layout.model_chunks
    tensor_parallel = layout.tensor_parallel
    divided = [
        ("num_key_value_heads", shapes.groups, "tensor_parallel", tensor_parallel),
        ("num_attention_heads", shapes.heads, "tensor_parallel", tensor_parallel),
        ("intermediate_size", config.intermediate_size, "tensor_parallel", tensor_parallel),
    ]
    if shapes.delta:
        key_heads, value_heads = shapes.delta.key_heads, shapes.delta.value_heads
        axes, ranks = (
            "tensor_parallel x context_parallel",
            layout.context_parallel * tensor_parallel,
        )
        divided.append(("linear_num_key_heads", key_heads, axes, ranks))
        if value_heads % key_heads:
            raise RecipeError(
                f"linear_num_key_heads={key_heads} does not divide linear_num_value_heads={value_heads}"
            )
    if uneven := layout.uneven_stages:
        # What the first and the last pipeline rank leave must divide over the others.
        between = layout.pipeline_parallel - len(uneven)
        left, parts = layers - sum(uneven.values()), between * layout.model_chunks
        divides = left >= parts and left % parts == 0 if parts else left == 0
        if not divides:
            settings = ", ".join(f"learner.{name}={number}" for name, number in uneven.items())
            raise RecipeError(
                f"{settings}: of the model's num_hidden_layers={layers} that leaves {left} for the {between} "
                "pipeline ranks between: each of their model_chunks needs as many"
            )
    else:
        divided.append(("num_hidden_layers", layers, "pipeline_parallel x model_chunks", stages))
    if moe:
        experts, width = moe["num_moe_experts"], moe["moe_ffn_hidden_size"]
        by, parts = "expert_tensor_parallel", layout.expert_tensor_parallel
        if moe.get("add_bias_linear") and parts > 1:
            raise RecipeError(
                f"learner.{by}={parts}: experts with biases, as this {config.model_type} model has, need 1 "
                "(Megatron-core refuses it otherwise)"
            )
        divided.append(("num_experts", experts, "expert_parallel", layout.expert_parallel))
        divided.append(("moe_intermediate_size", width, by, parts))
        if tensor_parallel > 1 and not layout.sequence_parallel:
            raise RecipeError(
                f"learner.tensor_parallel={tensor_parallel} of a MoE model needs "
                "learner.sequence_parallel: true (Megatron-core refuses it otherwise)"
            )
    elif layout.expert_parallel > 1 or layout.expert_tensor_parallel > 1:
        raise RecipeError(
            f"learner.expert_parallel={layout.expert_parallel}, expert_tensor_parallel="
            f"{layout.expert_tensor_parallel}: this {config.model_type} model has no experts"
        )
    for key, number, by, parts in divided:
        if number % parts:
            raise RecipeError(f"learner.{by}={parts} does not divide the model's {key}={number}")


def _rope(parameters: dict[str, Any], latent: bool, yarn: bool) -> tuple[float, float | None]:
    """Base, and the factor of Llama 3's scaling if the model has it."""
    kind = parameters.get("rope_type", "default")
    # Latent attention has a rope of its own.
    if kind == "default" or (kind == "yarn" and (latent or yarn)):
        return parameters["rope_theta"], None
    if kind == "llama3" and not latent:
        # Megatron fixes the other three numbers (rotary_pos_emb.py, 0.19.2).
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
    supported = "'default', 'yarn'" if latent else "'default', 'llama3'"
    raise RecipeError(f"rope_type={kind!r} is not supported; supported: {supported}")
