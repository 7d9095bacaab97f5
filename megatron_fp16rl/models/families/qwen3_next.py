"""Qwen3-Next: three layers of a gated delta net to one of gated attention, experts in all."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import (
    ATTENTION_BIAS,
    DENSE,
    EXPERTS,
    QK_NORM,
    TINY,
    check_untied,
)
from megatron_fp16rl.models.families.family import Family, Rule
from megatron_fp16rl.models.layouts import (
    Cut,
    DeltaConvolution,
    DeltaInput,
    GatedQueryKeyValue,
    GatedRows,
    Replicated,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DELTA_NET = tuple(
    Rule(
        f"decoder.layers.{{}}.self_attention.{megatron}",
        tuple(f"model.layers.{{}}.linear_attn.{name}" for name in hf),
        layout,
    )
    for megatron, hf, layout in (
        ("in_proj.weight", ("in_proj_qkvz.weight", "in_proj_ba.weight"), DeltaInput()),
        ("conv1d.weight", ("conv1d.weight",), DeltaConvolution()),
        ("dt_bias", ("dt_bias",), Cut(0)),
        ("A_log", ("A_log",), Cut(0)),
        ("out_norm.weight", ("norm.weight",), Replicated()),
        ("out_proj.weight", ("out_proj.weight",), Cut(1)),
    )
)
_GATED_ATTENTION = tuple(
    Rule(rule.megatron, rule.hf, GatedQueryKeyValue()) if "linear_qkv" in rule.megatron else rule
    for rule in DENSE
)
_SHARED = "decoder.layers.{}.mlp.shared_experts.", "model.layers.{}.mlp.shared_expert"
_SHARED_EXPERT = (
    Rule(
        f"{_SHARED[0]}linear_fc1.weight",
        (f"{_SHARED[1]}.gate_proj.weight", f"{_SHARED[1]}.up_proj.weight"),
        GatedRows(),
    ),
    Rule(f"{_SHARED[0]}linear_fc2.weight", (f"{_SHARED[1]}.down_proj.weight",), Cut(1)),
    Rule(f"{_SHARED[0]}gate_weight", (f"{_SHARED[1]}_gate.weight",), Replicated()),
)


def _options(config: "PretrainedConfig") -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": True,
        "linear_attention_freq": [int(kind == "linear_attention") for kind in config.layer_types],
        "linear_conv_kernel_dim": config.linear_conv_kernel_dim,
        "linear_key_head_dim": config.linear_key_head_dim,
        "linear_value_head_dim": config.linear_value_head_dim,
        "linear_num_key_heads": config.linear_num_key_heads,
        "linear_num_value_heads": config.linear_num_value_heads,
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": [1] * config.num_hidden_layers,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    }


def _interval(config: "PretrainedConfig") -> int:
    """Each so many layers there is one of attention, the last of them."""
    return int([*config.layer_types, "full_attention"].index("full_attention")) + 1


def _is_mixed(config: "PretrainedConfig") -> bool:
    kinds = ["linear_attention"] * (_interval(config) - 1) + ["full_attention"]
    expected = kinds * config.num_hidden_layers
    return bool(config.layer_types != expected[: config.num_hidden_layers])


def _served_as(config: "PretrainedConfig") -> dict[str, Any]:
    """SGLang 0.5.23 knows no other keys for these: without them, no model or another rope."""
    return {
        "full_attention_interval": _interval(config),
        "rope_theta": config.rope_parameters["rope_theta"],
        "partial_rotary_factor": config.rope_parameters["partial_rotary_factor"],
    }


_TINY = {
    **TINY,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000.0,  # neither is SGLang's default
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    # With less, the small outputs of random delta nets are normed up so far that gradients overflow at 2^15.
    "rms_norm_eps": 1e-3,
}

FAMILY = Family(
    "qwen3_next",
    _GATED_ATTENTION + QK_NORM + _DELTA_NET + EXPERTS + _SHARED_EXPERT,
    options=_options,
    unsupported=(
        ATTENTION_BIAS,
        ("layer_types other than attention in every n-th layer", _is_mixed),
        (
            "rope_type other than default",
            lambda config: config.rope_parameters.get("rope_type", "default") != "default",
        ),
        ("norm_topk_prob=false", lambda config: not config.norm_topk_prob),
        # SGLang takes every layer for sparse.
        ("mlp_only_layers", lambda config: bool(config.mlp_only_layers)),
        ("decoder_sparse_step other than 1", lambda config: config.decoder_sparse_step != 1),
    ),
    partial_rotary=True,
    check_served=check_untied,
    served_as=_served_as,
    sglang=("qwen3_next", "Qwen3NextForCausalLM"),
    tiny={"qwen3-next": _TINY},
)
