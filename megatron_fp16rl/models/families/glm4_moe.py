"""GLM-4.5: DeepSeek-V3's experts behind ordinary attention; bias and norms as the model has them."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import (
    BACKWARD_OVERFLOWS,
    DENSE,
    QK_NORM,
    QKV_BIAS,
    SIGMOID_EXPERTS,
    SIGMOID_ROUTING,
    TINY,
    check_untied,
    first_dense,
    sigmoid_experts,
)
from megatron_fp16rl.models.families.family import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(config: "PretrainedConfig") -> dict[str, Any]:
    return {
        "add_qkv_bias": bool(config.attention_bias),
        "qk_layernorm": bool(config.use_qk_norm),
        **sigmoid_experts(config, first_dense(config, config.first_k_dense_replace)),
    }


_TINY = {
    **TINY,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
}

FAMILY = Family(
    "glm4_moe",
    DENSE + QKV_BIAS + QK_NORM + SIGMOID_EXPERTS,
    options=_options,
    unsupported=SIGMOID_ROUTING,
    partial_rotary=True,
    check_served=check_untied,
    fp16_range=BACKWARD_OVERFLOWS,
    sglang=("glm4_moe", "Glm4MoeForCausalLM"),
    tiny={
        "glm4-moe": _TINY,
        "glm4-moe-plain": {**_TINY, "attention_bias": False, "use_qk_norm": False},
    },
)
