"""Staleness: how far the learner has moved from the weights that sampled a batch.

With `rollout.ahead` the log-probs of mu and pi differ for two reasons: other weights, and rounding.
mismatch/* is rounding alone, on sequences that both engines score with the same weights; staleness/* has
the same formulas on the training batch, where other weights outweigh rounding by far.
"""

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch


def versions(
    batch: Batch, version: int, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Mean and maximum over response tokens of how many versions older than `version` their weights are.

    Exact over the ranks of `group` (None: this rank alone).
    """
    age = (version - batch.versions.double()) * batch.mask
    sums, largest = torch.stack([age.sum(), batch.mask.sum().double()]), age.max()
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return {
        "staleness/versions_mean": (sums[0] / sums[1]).item(),
        "staleness/versions_max": int(largest.item()),
    }
