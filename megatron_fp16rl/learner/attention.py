"""Refuses long sequences where attention is not fused: it holds a score for each pair of tokens."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fp16rl import platform
from megatron_fp16rl.recipe import RecipeError

LONGEST_UNFUSED = 2048  # tokens; in fp16 the scores of one sequence in 16 heads are 128 MiB then


class Attention:
    """The attention kernels of a learner's model."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype, packed: bool) -> None:
        self.config, self.dtype, self.packed = config, dtype, packed
        self._kernels: dict[int, str | None] = {}  # by the number of tokens

    def kernel(self, tokens: int) -> str | None:
        """The kernel for sequences of `tokens`; None on a CPU, where it does not matter.

        Raises RecipeError if it is not fused and the sequences are long.
        """
        backend = platform.current()
        if tokens not in self._kernels:
            self._kernels[tokens] = backend.attention(self.config, self.dtype, tokens, self.packed)
        kernel = self._kernels[tokens]
        if kernel == "torch" and self.config.context_parallel_size > 1:
            raise RecipeError(
                f"learner.context_parallel={self.config.context_parallel_size} needs Transformer Engine on "
                "GPUs, and it is not installed here; install it (requirements.txt), or set it to 1"
            )
        if kernel == "unfused" and tokens > LONGEST_UNFUSED:
            raise RecipeError(
                f"attention over {tokens:,} tokens would hold {tokens:,} x {tokens:,} scores a head and "
                f"layer: no fused kernel is here for it (above {LONGEST_UNFUSED:,} tokens there must be). "
                f"{backend.describe()}. Remedy: Transformer Engine with a cuDNN that it trusts "
                "(fp16rl doctor), why not: NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2; or a smaller "
                "rollout.max_new_tokens and task.max_prompt_tokens"
            )
        return kernel
