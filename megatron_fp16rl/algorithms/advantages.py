"""How much better a sample was than expected.

Every function takes rewards and groups, both [batch], and returns advantages [batch]; samples of one
prompt share a group number and must all be there.
"""

import torch


def grpo(rewards: torch.Tensor, groups: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Reward minus the mean of its group, over the group's standard deviation (unbiased).

    A group whose rewards are all equal gets zeros. Source: DeepSeekMath, arXiv 2402.03300, section
    4.1.2.
    """
    deviation, member_of, count = _from_group_mean(rewards, groups)
    variance = _sums(deviation**2, member_of, count) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt()[member_of] + eps)


def dr_grpo(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Reward minus the mean of its group. Source: Dr.GRPO, arXiv 2503.20783, section 3.2."""
    return _from_group_mean(rewards, groups)[0]


def rloo(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Reward minus the mean of the others in its group. Source: RLOO, arXiv 2402.14740, section 2.3.

    A sample without others gets zero.
    """
    deviation, member_of, count = _from_group_mean(rewards, groups)
    return (deviation * (count / (count - 1).clamp(min=1))[member_of]) * (count > 1)[member_of]


def reinforce(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The reward itself. Source: Williams, Machine Learning 8 (1992)."""
    return rewards.clone()


def normalised(
    values: torch.Tensor, group: torch.distributed.ProcessGroup | None, eps: float = 1e-6
) -> torch.Tensor:
    """Values minus their mean over all ranks of `group`, over their standard deviation (unbiased).

    values: [batch]. REINFORCE++ does so with its advantages (arXiv 2501.03262, section 3.2), whose
    baseline is the batch or, with a baseline, the group of a prompt.
    """
    sums = torch.stack([values.new_tensor(float(len(values))), values.sum()]).double()
    _reduce(sums, group)
    count, mean = sums[0], sums[1] / sums[0]
    squares = ((values.double() - mean) ** 2).sum()
    _reduce(squares, group)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return ((values.double() - mean) / (deviation + eps)).to(values.dtype)


def overlong_penalty(lengths: torch.Tensor, limit: int, buffer: int) -> torch.Tensor:
    """What is added to the reward of long responses: from 0 at limit - buffer down to -1 at limit.

    lengths: [batch] response tokens. Source: DAPO, arXiv 2503.14476, equation 13.
    """
    return -((lengths - (limit - buffer)) / buffer).clamp(0, 1)


def _from_group_mean(
    rewards: torch.Tensor, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Deviations [batch], the place of each sample's group, and the sizes of groups."""
    _, member_of = groups.unique(return_inverse=True)
    count = torch.bincount(member_of).to(rewards.dtype)
    return rewards - (_sums(rewards, member_of, count) / count)[member_of], member_of, count


def _sums(values: torch.Tensor, member_of: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like).index_add_(0, member_of, values)


def _reduce(tensor: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> None:
    if group is not None:
        torch.distributed.all_reduce(tensor, group=group)
