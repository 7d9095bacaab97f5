"""Qwen2-MoE: Qwen2 with experts, and a gated shared expert."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import (
    DENSE,
    EXPERTS,
    QKV_BIAS,
    SHARED_EXPERT_GATE,
    SLIDING_WINDOW,
    check_qwen_experts_served,
    qwen_experts,
    shared_expert,
)
from megatron_fp16rl.models.families.family import Family
from megatron_fp16rl.models.families.qwen3_moe import TINY_MOE

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(config: "PretrainedConfig") -> dict[str, Any]:
    return {
        "add_qkv_bias": True,
        **qwen_experts(config),
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    }


FAMILY = Family(
    "qwen2_moe",
    DENSE + QKV_BIAS + EXPERTS + shared_expert("shared_expert") + SHARED_EXPERT_GATE,
    options=_options,
    unsupported=(SLIDING_WINDOW,),
    check_served=check_qwen_experts_served,
    sglang=("qwen2_moe", "Qwen2MoeForCausalLM"),
    tiny={
        "qwen2-moe": {
            **TINY_MOE,
            "shared_expert_intermediate_size": 80,
            "norm_topk_prob": False,
        }
    },
)
