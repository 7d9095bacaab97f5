"""Qwen2, Qwen2.5, and R1's distillations of them: a bias for queries, keys and values."""

import math

from megatron_fp16rl.models.families.blocks import DENSE, QKV_BIAS, SLIDING_WINDOW, TINY
from megatron_fp16rl.models.families.family import Family

FAMILY = Family(
    "qwen2",
    DENSE + QKV_BIAS,
    options=lambda config: {"add_qkv_bias": True},
    unsupported=(SLIDING_WINDOW,),
    fp16_range=(
        math.inf,
        "R1-Distill-Qwen-1.5B was trained, and adapters of Qwen2.5-Math-1.5B (the paper)",
    ),
    sglang=("qwen2", "Qwen2ForCausalLM"),
    tiny={"qwen2": TINY},
)
