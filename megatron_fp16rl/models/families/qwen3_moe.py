"""Qwen3-MoE: Qwen3 with experts in all layers, or in some."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import (
    ATTENTION_BIAS,
    BACKWARD_OVERFLOWS,
    DENSE,
    EXPERTS,
    QK_NORM,
    SLIDING_WINDOW,
    TINY,
    check_untied,
)
from megatron_fp16rl.models.families.family import Family
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TINY_MOE = {
    **TINY,
    "tie_word_embeddings": True,  # for the learner's tests: servers refuse it
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _options(config: "PretrainedConfig") -> dict[str, Any]:
    """Softmax over all experts, then the best k, renormalised or not."""
    sparse = [
        int(i not in (config.mlp_only_layers or []) and (i + 1) % config.decoder_sparse_step == 0)
        for i in range(config.num_hidden_layers)
    ]
    return {
        "qk_layernorm": True,
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": sparse,
        # Softmax over the best k alone is softmax over all, renormalised over the best k.
        "moe_router_pre_softmax": not config.norm_topk_prob,
    }


def _check_served(config: "PretrainedConfig") -> None:
    """See Family.check_served."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise RecipeError(
            f"mlp_only_layers={config.mlp_only_layers}, decoder_sparse_step="
            f"{config.decoder_sparse_step}: SGLang takes every layer of a {config.model_type} model "
            "for sparse and would serve unset weights; only models with experts in all layers work"
        )
    check_untied(config)


FAMILY = Family(
    "qwen3_moe",
    DENSE + QK_NORM + EXPERTS,
    options=_options,
    unsupported=(ATTENTION_BIAS, SLIDING_WINDOW),
    check_served=_check_served,
    fp16_range=(
        BACKWARD_OVERFLOWS[0],
        f"{BACKWARD_OVERFLOWS[1]}. Qwen3-30B-A3B was trained (the paper; verl PR 4158)",
    ),
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
