"""Token losses: functions of log-probs, to be minimised."""

import torch


def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) with r = pi / pi_old, for each token.

    All tensors [batch, seq], log-probs in nats. Returns the losses [batch, seq], zero outside the
    mask, and the number of tokens whose clipped term was the larger ("clipped").
    Source: PPO, arXiv 1707.06347, equation 7; asymmetric range: DAPO, arXiv 2503.14476, section 3.1.
    """
    ratio = torch.exp((logprobs - old_logprobs) * mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    chosen = torch.maximum(plain, clipped) * mask
    return chosen, {"clipped": ((clipped > plain) & mask).sum()}


def negative_log_likelihood(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-log p of each response token; [batch, seq], zero outside the mask."""
    return -logprobs * mask
