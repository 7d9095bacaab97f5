"""Qwen2, Qwen2.5, and R1's distillations of them: a bias for queries, keys and values."""

from megatron_fp16rl.models.families.blocks import DENSE, QKV_BIAS, SLIDING_WINDOW, TINY
from megatron_fp16rl.models.families.family import Family

FAMILY = Family(
    "qwen2",
    DENSE + QKV_BIAS,
    options=lambda config: {"add_qkv_bias": True},
    unsupported=(SLIDING_WINDOW,),
    sglang=("qwen2", "Qwen2ForCausalLM"),
    tiny={"qwen2": TINY},
)
