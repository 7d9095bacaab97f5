"""What is learnt from a batch: advantages, losses and how token losses become one number.

Pure functions of tensors; the learner and the servers are not known here.
"""

from dataclasses import dataclass

import torch

from megatron_fp16rl.algorithms import advantages, losses
from megatron_fp16rl.batch import Batch
from megatron_fp16rl.recipe import Algorithm as Settings


@dataclass(frozen=True)
class Algorithm:
    """The algorithm of a recipe."""

    settings: Settings

    def prepare(self, batch: Batch) -> Batch:
        """Adds advantages. The samples of a prompt must all be in this batch."""
        per_sequence = advantages.grpo(batch.rewards, batch.groups)
        return batch.replace(advantages=per_sequence[:, None] * batch.mask)

    def token_losses(
        self, logprobs: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of each token [batch, seq], and sums over response tokens of what is worth a look."""
        return losses.ppo_clip(
            logprobs,
            batch.pi_logprobs,
            batch.advantages,
            batch.mask,
            self.settings.clip_low,
            self.settings.clip_high,
        )

    def normaliser(self, batch: Batch) -> torch.Tensor:
        """What this rank adds to the divisor of the summed loss of one update: its tokens."""
        return batch.mask.sum().float()
