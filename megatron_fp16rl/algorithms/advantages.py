"""How much better a sample was than expected."""

import torch


def grpo(rewards: torch.Tensor, groups: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Reward minus the mean of its group, over the group's standard deviation (unbiased).

    rewards, groups: [batch]; returns [batch]. A group whose rewards are all equal gets zeros.
    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    _, member_of = groups.unique(return_inverse=True)
    count = torch.bincount(member_of).to(rewards.dtype)
    mean = torch.zeros_like(count).index_add_(0, member_of, rewards) / count
    deviation = rewards - mean[member_of]
    variance = torch.zeros_like(count).index_add_(0, member_of, deviation**2) / (count - 1).clamp(
        min=1
    )
    return deviation / (variance.sqrt()[member_of] + eps)
