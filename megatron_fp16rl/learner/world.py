"""The learner ranks: who they are, and how they talk."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_fp16rl import platform


@dataclass(frozen=True)
class World:
    """One rank's view of the learner.

    A replica is one whole model: the ranks that hold its tensor-parallel shards. Its leader, the
    first of them, collects rollouts for all.
    """

    rank: int
    size: int
    device: torch.device
    tensor_parallel: int
    tensor_rank: int
    tensor_group: dist.ProcessGroup
    data_parallel: int
    data_rank: int
    data_group: dist.ProcessGroup

    @property
    def is_leader(self) -> bool:
        return self.tensor_rank == 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_leader(self, value: object) -> object:
        """The leader's `value`, on every rank of its replica."""
        if self.tensor_parallel == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, group=self.tensor_group, group_src=0)
        return holder[0]

    def from_first(self, value: object) -> object:
        """Rank 0's `value`, on every rank."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]


def initialize(tensor_parallel: int, seed: int, timeout_s: float = 1800) -> World:
    """Joins torch.distributed and Megatron's process groups.

    Rank, world size and rendezvous come from the environment that torchrun and our launchers set:
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
    """
    here = platform.current()
    here.prepare_learner()
    # Only now: importing Megatron-core touches what the platform has just prepared.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group(here.COLLECTIVES, timeout=datetime.timedelta(seconds=timeout_s))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=here.device(),
        tensor_parallel=tensor_parallel,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_parallel=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_group=parallel_state.get_data_parallel_group(),
    )


def shutdown() -> None:
    """Leaves Megatron's groups and torch.distributed."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def single_process_environment(port: int) -> None:
    """Makes this process a world of one, for tools that run the learner without a launcher."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
