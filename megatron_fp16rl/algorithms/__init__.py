"""The algorithm of a recipe: advantages, a loss, corrections, and how token losses become one number.

Pure functions of tensors. To add one, write it in advantages.py, losses.py or corrections.py, and add it
to the table there and to the key's choices in recipe/algorithm.py.
"""

import torch

from megatron_fp16rl.algorithms import corrections, losses
from megatron_fp16rl.algorithms.advantages import ADVANTAGES, Ranks, overlong_penalty
from megatron_fp16rl.data.batch import Batch, ScoredBatch, TrainBatch
from megatron_fp16rl.recipe import Algorithm as Settings


class Algorithm:
    """The algorithm of a recipe."""

    def __init__(self, settings: Settings, max_tokens: int) -> None:
        """max_tokens: the longest response that the recipe allows.

        Raises RecipeError for a loss of the user's own that cannot be imported.
        """
        self.settings, self.max_tokens = settings, max_tokens
        self.loss = losses.find(settings.loss)

    def prepare(self, batch: ScoredBatch, ranks: Ranks = None) -> TrainBatch:
        """Adds advantages. The samples of a prompt must all be in this batch.

        ranks: those that have the rest of the step's samples; None: there is no rest.
        """
        # What shapes the reward comes first: advantages compare all that a response earns.
        rewards, settings = batch.rewards, self.settings
        if settings.overlong is not None:
            # From the first token to the last: what an environment says is part of the limit, too.
            follows, precedes = batch.mask.cumsum(1) > 0, batch.mask.flip(1).cumsum(1).flip(1) > 0
            lengths = (follows & precedes).sum(1)
            shape = overlong_penalty(lengths, self.max_tokens, settings.overlong.buffer)
            rewards = rewards + settings.overlong.penalty * shape
        if settings.kl is not None and settings.kl.into == "reward":
            penalty = self._kl(batch.pi, batch).sum(1)
            rewards = rewards - settings.kl.coefficient * penalty
        per_sequence = ADVANTAGES[settings.advantage](rewards, batch.groups, ranks)
        return batch.with_advantages(per_sequence[:, None] * batch.mask)

    def token_losses(self, logprobs: torch.Tensor, batch: TrainBatch) -> losses.Losses:
        """The loss of each token [batch, seq], and statistics to log: sums over response tokens.

        logprobs: [batch, seq] in nats, with a gradient.
        """
        settings = self.settings
        # Three policies: mu sampled, pi_old is the learner before the update, pi is what learns.
        on_mu = settings.old_policy == "rollout"
        token_losses, statistics = self.loss(
            losses.LossInputs(
                logprobs=logprobs,
                old_logprobs=batch.mu_logprobs if on_mu else batch.pi,
                mu_logprobs=batch.mu_logprobs,
                advantages=batch.advantages,
                mask=batch.mask,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                dual_clip=settings.dual_clip,
                delta=settings.bound,
            )
        )
        if settings.correction is not None:
            # pi_old / mu; pi / mu for the one loss that has no ratio pi / pi_old of its own.
            has_no_ratio = settings.loss == "policy_gradient"
            pi = logprobs.detach() if has_no_ratio else batch.pi
            weight, corrected = corrections.weights(
                pi, batch.mu_logprobs, batch.mask, settings.correction
            )
            token_losses, statistics = token_losses * weight, {**statistics, **corrected}
        if settings.kl is not None and settings.kl.into == "loss":
            penalty = self._kl(logprobs, batch)
            token_losses = token_losses + settings.kl.coefficient * penalty
            statistics = {**statistics, "kl": penalty.detach().sum()}
        # With this the sum over all tokens is one of sequences' means; `normaliser` counts sequences.
        if settings.aggregation == "sequence_mean":
            token_losses = token_losses / batch.mask.sum(1, keepdim=True).clamp(min=1)
        return token_losses, statistics

    def normaliser(self, batch: Batch) -> torch.Tensor:
        """What this rank adds to the divisor of the summed loss of one update."""
        if self.settings.aggregation == "token_mean":
            return batch.mask.sum().float()
        sequences = torch.tensor(float(len(batch)), device=batch.mask.device)
        return sequences * (self.max_tokens if self.settings.aggregation == "max_length" else 1)

    def _kl(self, logprobs: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """[batch, seq] estimate of the KL divergence from the policy that is the anchor."""
        settings = self.settings.kl
        assert settings is not None
        anchor = batch.mu_logprobs if settings.anchor == "rollout" else batch.reference_logprobs
        if anchor is None:
            raise ValueError("the batch was scored without a reference policy")
        return losses.kl_penalty(logprobs, anchor, batch.mask, settings.estimate)
