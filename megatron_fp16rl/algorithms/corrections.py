"""Importance-sampling corrections for the mismatch between rollout policy mu and learner policy pi.

Orthogonal to the loss, which each weight multiplies. A correction is a ratio w, one of `RATIOS`,

  token       pi / mu of each token
  sequence    the product over a response
  geometric   the geometric mean over a response
  k3          not a ratio: the mean of exp(d) - 1 - d over a response, d = log pi - log mu; to reject
  k3_max      the largest of these: a response is rejected for one token (TRM)

and an action on it, one of `ACTIONS`:

  truncate   w clamped to low and high             TIS, truncated importance sampling (high alone)
  mask       w where low <= w <= high, else 0      MIS, masked importance sampling; IcePop, two-sided
  reject     1 where low <= w <= high, else 0      rejection: nothing is reweighted

Sources: token TIS, "Your efficient RL framework secretly brings you off-policy RL training" (Yao et
al., 2025); sequence TIS and MIS, "When speed kills stability" (Liu et al., 2025); IcePop (Ling team,
2025); their use under FP16 and BF16, arXiv 2510.26788, section 4; TRM, arXiv 2512.23075, whose bound is on
the KL divergence over the vocabulary: here it is estimated from the sampled token.
"""

from collections.abc import Callable

import torch

from megatron_fp16rl.recipe.algorithm import Correction

_MAX_LOG_RATIO = 60.0


def _bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _k3(d: torch.Tensor) -> torch.Tensor:
    return torch.expm1(_bounded(d)) - _bounded(d)


# Each takes d [batch, seq], zero outside the mask, and the tokens of each response [batch, 1].
RATIOS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "token": lambda d, tokens: _bounded(d).exp(),
    "sequence": lambda d, tokens: _bounded(d.sum(1, keepdim=True)).exp(),
    "geometric": lambda d, tokens: _bounded(d.sum(1, keepdim=True) / tokens).exp(),
    "k3": lambda d, tokens: _k3(d).sum(1, keepdim=True) / tokens,
    "k3_max": lambda d, tokens: _k3(d).amax(
        1, keepdim=True
    ),  # never negative, zero outside the mask
}
# Each takes w, low, high and where w is inside them.
ACTIONS: dict[str, Callable[[torch.Tensor, float, float, torch.Tensor], torch.Tensor]] = {
    "truncate": lambda w, low, high, inside: w.clamp(low, high),
    "mask": lambda w, low, high, inside: torch.where(inside, w, 0.0),
    "reject": lambda w, low, high, inside: inside.to(w.dtype),
}


def weights(
    pi_logprobs: torch.Tensor,
    mu_logprobs: torch.Tensor,
    mask: torch.Tensor,
    correction: Correction,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weight of each token [batch, seq], zero outside the mask, without a gradient.

    Log-probs are [batch, seq] in nats. Statistics, sums over response tokens: "corrected" counts tokens
    whose weight the bounds changed, "weight" adds up the weights.
    """
    d = torch.where(mask, pi_logprobs - mu_logprobs, 0.0).detach().float()
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    ratio = RATIOS[correction.ratio](d, tokens).expand_as(mask)
    low = 0.0 if correction.low is None else correction.low
    high = float("inf") if correction.high is None else correction.high
    inside = (ratio >= low) & (ratio <= high)
    weight = torch.where(mask, ACTIONS[correction.action](ratio, low, high, inside), 0.0)
    return weight, {"corrected": (~inside & mask).sum(), "weight": weight.sum()}
