"""Token losses: functions of log-probs, to be minimised.

All tensors are [batch, seq], log-probs in nats. Losses are zero outside the mask. Ratios are those of
the policy that learns (logprobs) to the policy that it was when the batch came (old_logprobs).
Statistics are sums over response tokens.
"""

import torch

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]
_MAX_LOG_RATIO = 60.0  # exp of it, squared and summed, is still far from the end of fp32


def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Losses:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r the ratio of each token.

    dual_clip: c > 1; where A < 0 the loss is at most -A c. "clipped" counts the tokens whose loss has
    no gradient for being clipped. Sources: PPO, arXiv 1707.06347, equation 7; asymmetric range: DAPO,
    arXiv 2503.14476, section 3.1; dual clip: arXiv 1912.09729, equation 5.
    """
    ratio = torch.exp(_log_ratio(logprobs, old_logprobs, mask))
    return _clipped(ratio, advantages, mask, clip_low, clip_high, dual_clip)


def gspo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> Losses:
    """The clipped loss with one ratio a sequence: the geometric mean of its tokens' ratios.

    Each token has its sequence's loss, to be averaged over tokens and then over sequences. Source:
    GSPO, arXiv 2507.18071, equations 5 to 7.
    """
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    mean = _log_ratio(logprobs, old_logprobs, mask).sum(1, keepdim=True) / tokens
    return _clipped(mean.exp().expand_as(mask), advantages, mask, clip_low, clip_high, None)


def cispo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> Losses:
    """-A log pi, weighted with the clipped ratio, which has no gradient: no token is left out.

    Source: MiniMax-M1, arXiv 2506.13585, equations 4 and 5.
    """
    ratio = torch.exp(_log_ratio(logprobs, old_logprobs, mask)).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return _masked(-advantages * weight * logprobs, mask), {
        "clipped": ((weight != ratio) & mask).sum()
    }


def policy_gradient(logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Losses:
    """-A log pi. Source: REINFORCE, Williams, Machine Learning 8 (1992)."""
    return _masked(-advantages * logprobs, mask), {"clipped": mask.sum() * 0}


def negative_log_likelihood(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-log p of each response token."""
    return _masked(-logprobs, mask)


def kl_penalty(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor, estimator: str
) -> torch.Tensor:
    """An estimate of KL[pi || reference] for each token sampled from pi.

    With d = log reference - log pi: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. Source: Schulman,
    "Approximating KL divergence" (2020). As a loss, only k2 has the gradient of the KL divergence.
    """
    d = _log_ratio(reference_logprobs, logprobs, mask)
    return {"k1": -d, "k2": d**2 / 2, "k3": torch.expm1(d) - d}[estimator]


def _clipped(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Losses:
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    chosen = torch.maximum(plain, clipped)
    was_clipped = clipped > plain
    if dual_clip is not None:
        cap = -advantages * dual_clip
        capped = (advantages < 0) & (chosen > cap)
        chosen, was_clipped = torch.where(capped, cap, chosen), was_clipped | capped
    return _masked(chosen, mask), {"clipped": (was_clipped & mask).sum()}


def _log_ratio(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log pi - log old, zero outside the mask, bounded so that no ratio becomes infinite."""
    return torch.where(mask, logprobs - old, 0.0).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _masked(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, losses, 0.0)
