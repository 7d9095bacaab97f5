"""Qwen3-MoE: Qwen3 with experts in all layers, or in some."""

from megatron_fp16rl.models.families.blocks import (
    ATTENTION_BIAS,
    BACKWARD_OVERFLOWS,
    DENSE,
    EXPERTS,
    QK_NORM,
    SLIDING_WINDOW,
    TINY,
    check_qwen_experts_served,
    qwen_experts,
)
from megatron_fp16rl.models.families.family import Family

TINY_MOE = {
    **TINY,
    "tie_word_embeddings": True,
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

FAMILY = Family(
    "qwen3_moe",
    DENSE + QK_NORM + EXPERTS,
    options=lambda config: {"qk_layernorm": True, **qwen_experts(config)},
    unsupported=(ATTENTION_BIAS, SLIDING_WINDOW),
    check_served=check_qwen_experts_served,
    fp16_range=BACKWARD_OVERFLOWS,
    sglang=("qwen3_moe", "Qwen3MoeForCausalLM"),
    tiny={
        "qwen3-moe": TINY_MOE,
        "qwen3-moe-mixed": {
            **TINY_MOE,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    },
)
