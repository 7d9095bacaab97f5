"""What is learnt from a batch: advantages, losses, corrections, and how token losses become one number.

Pure functions of tensors; the learner and the servers are not known here.
"""

from dataclasses import dataclass

import torch

from megatron_fp16rl.algorithms import advantages, corrections, losses
from megatron_fp16rl.data.batch import Batch, ScoredBatch, TrainBatch
from megatron_fp16rl.recipe import Algorithm as Settings

Group = torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Algorithm:
    """The algorithm of a recipe.

    max_tokens: the longest response that the recipe allows.
    """

    settings: Settings
    max_tokens: int

    def prepare(self, batch: ScoredBatch, group: Group | None = None) -> TrainBatch:
        """Adds advantages. The samples of a prompt must all be in this batch.

        group: of the ranks that have the rest of the step's samples; None: there is no rest.
        """
        per_sequence = self._advantages(self._shaped_rewards(batch), batch.groups, group)
        return batch.with_advantages(per_sequence[:, None] * batch.mask)

    def token_losses(
        self, logprobs: torch.Tensor, batch: TrainBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of each token [batch, seq], and sums over response tokens of what is worth a look."""
        settings = self.settings
        found, stats = self._losses(logprobs, batch)
        if settings.correction is not None:
            weight, more = self._correction(logprobs, batch)
            found, stats = found * weight, {**stats, **more}
        if settings.kl is not None and settings.kl.into == "loss":
            penalty = self._kl(logprobs, batch)
            found = found + settings.kl.coefficient * penalty
            stats["kl"] = penalty.detach().sum()
        if settings.aggregation == "sequence_mean":
            found = found / batch.mask.sum(1, keepdim=True).clamp(min=1)
        return found, stats

    def normaliser(self, batch: Batch) -> torch.Tensor:
        """What this rank adds to the divisor of the summed loss of one update."""
        if self.settings.aggregation == "token_mean":
            return batch.mask.sum().float()
        sequences = torch.tensor(float(len(batch)), device=batch.mask.device)
        return sequences * (self.max_tokens if self.settings.aggregation == "max_length" else 1)

    def _shaped_rewards(self, batch: ScoredBatch) -> torch.Tensor:
        rewards, settings = batch.rewards, self.settings
        if settings.overlong is not None:
            lengths = batch.mask.sum(1)
            shape = advantages.overlong_penalty(lengths, self.max_tokens, settings.overlong.buffer)
            rewards = rewards + settings.overlong.penalty * shape
        if settings.kl is not None and settings.kl.into == "reward":
            penalty = self._kl(batch.pi_logprobs, batch).sum(1)
            rewards = rewards - settings.kl.coefficient * penalty
        return rewards

    def _advantages(
        self, rewards: torch.Tensor, groups: torch.Tensor, group: Group | None
    ) -> torch.Tensor:
        name = self.settings.advantage
        if name == "reinforce_pp":
            return advantages.normalised(rewards, group)
        if name == "reinforce_pp_baseline":
            return advantages.normalised(advantages.dr_grpo(rewards, groups), group)
        return getattr(advantages, name)(rewards, groups)

    def _losses(
        self, logprobs: torch.Tensor, batch: TrainBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings = self.settings
        if settings.loss == "policy_gradient":
            return losses.policy_gradient(logprobs, batch.advantages, batch.mask)
        old = batch.mu_logprobs if settings.old_policy == "rollout" else batch.pi_logprobs
        bounds = [settings.clip_low, settings.clip_high]
        if settings.loss == "ppo_clip":
            bounds.append(settings.dual_clip)
        function = getattr(losses, settings.loss)
        return function(logprobs, old, batch.advantages, batch.mask, *bounds)

    def _correction(
        self, logprobs: torch.Tensor, batch: TrainBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weights by pi_old / mu; by pi / mu where the loss itself has no ratio to pi_old."""
        settings = self.settings.correction
        current = self.settings.loss == "policy_gradient"
        pi = logprobs.detach() if current else batch.pi_logprobs
        return corrections.weights(
            pi,
            batch.mu_logprobs,
            batch.mask,
            settings.ratio,
            settings.action,
            settings.low,
            settings.high,
        )

    def _kl(self, logprobs: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
        return losses.kl_penalty(
            logprobs, batch.reference_logprobs, batch.mask, self.settings.kl.estimator
        )
