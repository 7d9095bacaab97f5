"""Process groups of the learner: tensor, pipeline, data and expert parallelism."""

import datetime
import math
import os
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.recipe import Layout
from megatron_fp16rl.utils import tcp_store

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One process group: its size, and this process's rank in it."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class World:
    """One rank's view of the learner's process groups.

    A replica learns from the same sequences: the ranks that hold a dense model's tensor- and pipeline-parallel
    shards, as often as there are context-parallel ranks, which have parts of each sequence. Its leader, the
    first of them, collects rollouts for all. `data_context` are the ranks with the same shards. Experts are
    sharded over `expert` and `expert_tensor`, across replicas, and replicated over `expert_data`.
    """

    rank: int
    size: int
    device: torch.device
    layout: Layout
    tensor: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    data_context: Axis
    expert: Axis
    expert_tensor: Axis
    expert_data: Axis
    replica: Axis

    @property
    def is_leader(self) -> bool:
        return self.replica.rank == 0

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.pipeline.rank == self.pipeline.size - 1

    def leader_of(self, stage: int) -> int:
        """The first rank of a pipeline stage in rank 0's replica."""
        return stage * (self.size // self.pipeline.size)

    def gather(self, value: T, axis: Axis | None = None) -> list[T]:
        """Every rank's `value`, in the order of ranks, on all ranks of `axis` (default: the world)."""
        values = cast(list[T], [None] * (axis.size if axis else self.size))
        dist.all_gather_object(values, value, group=axis and axis.group)
        return values

    def broadcast_from_rank0(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def broadcast_from_leader(self, value: T) -> T:
        """The leader's `value`, on every rank of its replica."""
        return _broadcast(value, self.replica, 0)

    def broadcast_from_last_stage(self, value: T) -> T:
        """The last pipeline stage's `value`, on every stage."""
        return _broadcast(value, self.pipeline, self.pipeline.size - 1)


def _broadcast(value: T, axis: Axis, source: int) -> T:
    if axis.size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, group=axis.group, group_src=source)
    return holder[0]


def initialize(layout: Layout, seed: int, timeout_s: float = 1800) -> World:
    """Joins torch.distributed and creates Megatron's process groups.

    Rank, world size and rendezvous come from the environment variables of torchrun and our launchers:
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Raises ValueError if the world size is not
    the layout's.
    """
    if layout.tensor_parallel > 1:
        # Megatron overlaps a layer's collectives with its products by launch order, which the device
        # keeps only with one queue (tensor_parallel/layers.py). CUDA reads the variable.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    backend = platform.current()
    backend.prepare_learner()
    # Only now: importing Megatron-core touches what the platform has just prepared.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        tcp_store.init_process_group(backend.COLLECTIVES, timeout_s)
    if dist.get_world_size() != layout.ranks:
        raise ValueError(
            f"the recipe is for learner.ranks={layout.ranks}, but {dist.get_world_size()} were started"
        )
    chunks = layout.model_chunks
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),  # same as the default group's
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=backend.device(),
        layout=layout,
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        data_context=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        expert=_axis(parallel_state.get_expert_model_parallel_group()),
        expert_tensor=_axis(parallel_state.get_expert_tensor_parallel_group()),
        expert_data=_axis(parallel_state.get_expert_data_parallel_group()),
        replica=_replica(layout, timeout_s),
    )


def _replica(layout: Layout, timeout_s: float) -> Axis:
    """The ranks of equal data-parallel rank. Megatron's model-parallel group has one context-parallel rank."""
    from megatron.core import parallel_state

    if layout.context_parallel == 1:
        return _axis(parallel_state.get_model_parallel_group())
    # Megatron's order of ranks: tensor, context, data, pipeline, the first the fastest.
    inner, data = layout.tensor_parallel * layout.context_parallel, layout.data_parallel
    replicas = [
        [rank for rank in range(layout.ranks) if rank // inner % data == number]
        for number in range(data)
    ]
    timeout = datetime.timedelta(seconds=timeout_s)
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in replicas]
    own = parallel_state.get_data_parallel_rank()
    if dist.get_rank() not in replicas[own]:
        raise RuntimeError("Megatron-core's order of ranks is not tensor, context, data, pipeline")
    return _axis(groups[own])


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(dist.get_world_size(group), dist.get_rank(group), group)


def shutdown() -> None:
    """Destroys Megatron's process groups and torch.distributed's."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def single_process_environment(port: int) -> None:
    """Makes this process a world of one, for tools that run the learner without a launcher."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
