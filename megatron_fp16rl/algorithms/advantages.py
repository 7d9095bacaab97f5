"""Advantages: how much better a sample was than expected; `ADVANTAGES` names them.

Every function takes rewards and groups, both [batch], and the process group of the ranks that have the
rest of the step's samples (None: there is no rest). It returns advantages [batch]. Samples of one prompt
share a group number and must all be there.
"""

from collections.abc import Callable

import torch

Ranks = torch.distributed.ProcessGroup | None


def grpo(
    rewards: torch.Tensor, groups: torch.Tensor, ranks: Ranks = None, eps: float = 1e-6
) -> torch.Tensor:
    """Reward minus the mean of its group, over the group's standard deviation (unbiased).

    A group whose rewards are all equal gets zeros. Source: DeepSeekMath, arXiv 2402.03300, section
    4.1.2.
    """
    deviation, group_index, count = _from_group_mean(rewards, groups)
    variance = _group_sums(deviation**2, group_index, count) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt()[group_index] + eps)


def dr_grpo(rewards: torch.Tensor, groups: torch.Tensor, ranks: Ranks = None) -> torch.Tensor:
    """Reward minus the mean of its group. Source: Dr.GRPO, arXiv 2503.20783, section 3.2."""
    return _from_group_mean(rewards, groups)[0]


def rloo(rewards: torch.Tensor, groups: torch.Tensor, ranks: Ranks = None) -> torch.Tensor:
    """Reward minus the mean of the others in its group. Source: RLOO, arXiv 2402.14740, section 2.3.

    A sample without others gets zero.
    """
    deviation, group_index, count = _from_group_mean(rewards, groups)
    return (deviation * (count / (count - 1).clamp(min=1))[group_index]) * (count > 1)[group_index]


def reinforce(rewards: torch.Tensor, groups: torch.Tensor, ranks: Ranks = None) -> torch.Tensor:
    """The reward itself. Source: Williams, Machine Learning 8 (1992)."""
    return rewards.clone()


def reinforce_pp(rewards: torch.Tensor, groups: torch.Tensor, ranks: Ranks = None) -> torch.Tensor:
    """Rewards normalised over the whole step. Source: REINFORCE++, arXiv 2501.03262, section 3.2."""
    return normalised(rewards, ranks)


def reinforce_pp_baseline(
    rewards: torch.Tensor, groups: torch.Tensor, ranks: Ranks = None
) -> torch.Tensor:
    """Rewards minus the mean of their group, normalised over the whole step. Source: as reinforce_pp."""
    return normalised(dr_grpo(rewards, groups), ranks)


ADVANTAGES: dict[str, Callable[[torch.Tensor, torch.Tensor, Ranks], torch.Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce": reinforce,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def normalised(values: torch.Tensor, ranks: Ranks, eps: float = 1e-6) -> torch.Tensor:
    """Values [batch] minus their mean over all ranks, over their standard deviation (unbiased)."""
    sums = torch.stack([values.new_tensor(float(len(values))), values.sum()]).double()
    _all_reduce(sums, ranks)
    count, mean = sums[0], sums[1] / sums[0]
    squares = ((values.double() - mean) ** 2).sum()
    _all_reduce(squares, ranks)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return ((values.double() - mean) / (deviation + eps)).to(values.dtype)


def overlong_penalty(lengths: torch.Tensor, limit: int, buffer: int) -> torch.Tensor:
    """Added to the reward of long responses: falls from 0 at limit - buffer to -1 at limit.

    lengths: [batch] tokens that follow the prompt. Source: DAPO, arXiv 2503.14476, equation 13.
    """
    return -((lengths - (limit - buffer)) / buffer).clamp(0, 1)


def _from_group_mean(
    rewards: torch.Tensor, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Deviations [batch], the index of each sample's group [batch], and the sizes of groups [groups]."""
    _, group_index = groups.unique(return_inverse=True)
    count = torch.bincount(group_index).to(rewards.dtype)
    mean = _group_sums(rewards, group_index, count) / count
    return rewards - mean[group_index], group_index, count


def _group_sums(
    values: torch.Tensor, group_index: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    return torch.zeros_like(count).index_add_(0, group_index, values)


def _all_reduce(tensor: torch.Tensor, ranks: Ranks) -> None:
    if ranks is not None:
        torch.distributed.all_reduce(tensor, group=ranks)
