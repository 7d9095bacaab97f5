"""The learner ranks: who they are, and how they talk."""

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.recipe import Layout
from megatron_fp16rl.utils import meeting


@dataclass(frozen=True)
class Axis:
    """One direction in which ranks divide the work: how many there are, and which one this is."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class World:
    """One rank's view of the learner.

    A replica is one whole dense model: the ranks that hold its tensor- and pipeline-parallel shards.
    Its leader, the first of them, collects rollouts for all. Experts are divided over the ranks of
    `expert` and `expert_tensor`, across replicas, and repeated over `expert_data`.
    """

    rank: int
    size: int
    device: torch.device
    layout: Layout
    tensor: Axis
    pipeline: Axis
    data: Axis
    expert: Axis
    expert_tensor: Axis
    expert_data: Axis
    replica: Axis

    @property
    def is_leader(self) -> bool:
        return self.replica.rank == 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.pipeline.rank == self.pipeline.size - 1

    def leader_of(self, stage: int) -> int:
        """The rank that holds a pipeline stage of rank 0's replica."""
        return stage * (self.size // self.pipeline.size)

    def from_leader(self, value: object) -> object:
        """The leader's `value`, on every rank of its replica."""
        return self._broadcast(value, self.replica, 0)

    def from_last_stage(self, value: object) -> object:
        """The last pipeline stage's `value`, on every stage."""
        return self._broadcast(value, self.pipeline, self.pipeline.size - 1)

    def from_first(self, value: object) -> object:
        """Rank 0's `value`, on every rank."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    @staticmethod
    def _broadcast(value: object, axis: Axis, source: int) -> object:
        if axis.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, group=axis.group, group_src=source)
        return holder[0]


def initialize(layout: Layout, seed: int, timeout_s: float = 1800) -> World:
    """Joins torch.distributed and Megatron's process groups.

    Rank, world size and rendezvous come from the environment that torchrun and our launchers set:
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Raises ValueError if the world is not of
    the size that the layout is for.
    """
    if layout.tensor_parallel > 1:
        # Megatron lets a layer's collectives and products overlap by the order in which it launches
        # them, which the device keeps only with one queue (tensor_parallel/layers.py). Read by CUDA.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    here = platform.current()
    here.prepare_learner()
    # Only now: importing Megatron-core touches what the platform has just prepared.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        meeting.join(here.COLLECTIVES, timeout_s)
    if dist.get_world_size() != layout.ranks:
        raise ValueError(
            f"the recipe is for learner.ranks={layout.ranks}, but {dist.get_world_size()} were started"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.model_chunks
        if layout.model_chunks > 1
        else None,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),  # its groups wait as long as ours
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=here.device(),
        layout=layout,
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        expert=_axis(parallel_state.get_expert_model_parallel_group()),
        expert_tensor=_axis(parallel_state.get_expert_tensor_parallel_group()),
        expert_data=_axis(parallel_state.get_expert_data_parallel_group()),
        replica=_axis(parallel_state.get_model_parallel_group()),
    )


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(dist.get_world_size(group), dist.get_rank(group), group)


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
