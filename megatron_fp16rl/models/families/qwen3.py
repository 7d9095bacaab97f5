"""Qwen3: norms of queries and keys in place of biases."""

from megatron_fp16rl.models.families.blocks import (
    ATTENTION_BIAS,
    DENSE,
    QK_NORM,
    SLIDING_WINDOW,
    TINY,
)
from megatron_fp16rl.models.families.family import Family

FAMILY = Family(
    "qwen3",
    DENSE + QK_NORM,
    options=lambda config: {"qk_layernorm": True},
    unsupported=(ATTENTION_BIAS, SLIDING_WINDOW),
    sglang=("qwen3", "Qwen3ForCausalLM"),
    tiny={"qwen3": TINY, "qwen3-tied": {**TINY, "tie_word_embeddings": True}},
)
