"""Weights that correct for sampling from mu (the rollout engine) what pi (the learner) is to learn.

Orthogonal to the loss, which each weight multiplies. The names say what is done with the ratio w:

  truncate   w clamped to low and high             TIS, truncated importance sampling (high alone)
  mask       w where low <= w <= high, else 0      MIS, masked importance sampling; IcePop, two-sided
  reject     1 where low <= w <= high, else 0      rejection: nothing is reweighted

and the ratio is one of

  token       pi / mu of each token
  sequence    the product over a response
  geometric   the geometric mean over a response
  k3          not a ratio: the mean of exp(d) - 1 - d over a response, d = log pi - log mu; to reject

Sources: token TIS, "Your efficient RL framework secretly brings you off-policy RL training" (Yao et
al., 2025); sequence TIS and MIS, "When speed kills stability" (Liu et al., 2025); IcePop (Ling team,
2025); their use under FP16 and BF16, arXiv 2510.26788, section 4.
"""

import torch

_MAX_LOG_RATIO = 60.0


def weights(
    pi_logprobs: torch.Tensor,
    mu_logprobs: torch.Tensor,
    mask: torch.Tensor,
    ratio: str,
    action: str,
    low: float | None,
    high: float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weight of each token [batch, seq], zero outside the mask, without a gradient.

    Log-probs are [batch, seq] in nats. low, high: None for no bound. Sums over response tokens:
    "corrected" of those whose weight is not what it would be without bounds, "weight" of weights.
    """
    d = torch.where(mask, pi_logprobs - mu_logprobs, 0.0).detach().float()
    value = _value(d, mask, ratio)
    low, high = 0.0 if low is None else low, float("inf") if high is None else high
    inside = (value >= low) & (value <= high)
    if action == "truncate":
        weight = value.clamp(low, high)
    elif action == "mask":
        weight = torch.where(inside, value, 0.0)
    else:
        weight = inside.to(value.dtype)
    weight = torch.where(mask, weight, 0.0)
    return weight, {"corrected": (~inside & mask).sum(), "weight": weight.sum()}


def _value(d: torch.Tensor, mask: torch.Tensor, ratio: str) -> torch.Tensor:
    """What the bounds are about, [batch, seq]; the same for all tokens of a sequence but for token."""
    if ratio == "token":
        return d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    if ratio == "k3":
        bounded = d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        whole = (torch.expm1(bounded) - bounded).sum(1, keepdim=True) / tokens
    else:
        total = d.sum(1, keepdim=True) / (tokens if ratio == "geometric" else 1)
        whole = total.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    return whole.expand_as(mask)
