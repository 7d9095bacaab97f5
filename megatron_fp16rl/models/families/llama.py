"""Llama 2 and 3; SmolLM2."""

import math

from megatron_fp16rl.models.families.blocks import ATTENTION_BIAS, DENSE, TINY
from megatron_fp16rl.models.families.family import Family

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

FAMILY = Family(
    "llama",
    DENSE,
    unsupported=(ATTENTION_BIAS, ("mlp_bias", lambda config: bool(config.mlp_bias))),
    fp16_range=(math.inf, "OctoThinker-3B was trained (the paper)"),
    sglang=("llama", "LlamaForCausalLM"),
    tiny={
        "llama": TINY,
        "llama-3.1": {**TINY, "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
    },
)
