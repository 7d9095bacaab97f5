"""Qwen3: norms of queries and keys in place of biases."""

import math

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
    fp16_range=(math.inf, "Qwen3-8B and Qwen3-14B were trained (verl PR 4086; the paper)"),
    sglang=("qwen3", "Qwen3ForCausalLM"),
    tiny={"qwen3": TINY, "qwen3-tied": {**TINY, "tie_word_embeddings": True}},
)
