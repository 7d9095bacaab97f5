"""Attention that is not fused keeps a score for each pair of tokens: long sequences are refused with it."""

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.recipe import RecipeError

LONGEST_UNFUSED = 2048  # tokens; in fp16 the scores of one sequence in 16 heads are 128 MiB then


class Attention:
    """The attention of a learner's model. config: Megatron's TransformerConfig."""

    def __init__(self, config: object, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self._kernels: dict[int, str | None] = {}  # by the number of tokens

    def kernel(self, tokens: int) -> str | None:
        """The kernel for sequences of `tokens`; None where it is of no importance: on a CPU.

        Raises RecipeError if it is not fused, and the sequences are long.
        """
        here = platform.current()
        if tokens not in self._kernels:
            self._kernels[tokens] = here.attention(self.config, self.dtype, tokens)
        found = self._kernels[tokens]
        if found == "unfused" and tokens > LONGEST_UNFUSED:
            raise RecipeError(
                f"attention over {tokens:,} tokens would hold {tokens:,} x {tokens:,} scores a head and "
                f"layer: no fused kernel is here for it (above {LONGEST_UNFUSED:,} tokens there must be). "
                f"{here.describe()}. Remedy: Transformer Engine with a cuDNN that it trusts "
                "(fp16rl doctor), why not: NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2; or a smaller "
                "rollout.max_new_tokens and task.max_prompt_tokens"
            )
        return found
