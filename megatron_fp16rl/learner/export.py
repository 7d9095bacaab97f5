"""A model's weights on their way out: each rank's shards, or full Hugging Face tensors on rank 0.

`local_shards` sends nothing; `gather` is one way to use shards, for those who need full tensors in
one place: folders, and transports that start from one rank.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megatron_fp16rl.learner.model import HFTensors, Model, Shard, Shards, largest_magnitude
from megatron_fp16rl.parallel import Axis
from megatron_fp16rl.utils.errors import FinalError

# The value of a parameter shard that is exported: itself, its gradient, ... of the shard's shape
Value = Callable[[torch.Tensor], torch.Tensor]


class WeightRangeError(FinalError):
    """A weight of the learner is not finite, or beyond what servers can hold."""


def local_shards(model: Model) -> Iterator[tuple[Shard, torch.Tensor]]:
    """Each of this rank's shards that belongs to the weights, and its value. Not collective.

    Adapters are merged into the weights, one at a time: who gets these need not know of adapters.
    Buffers stay fp32, and come first: in a bucket of bytes every tensor is then aligned.
    """
    for shard in model.buffers:
        yield shard, shard.parameter.detach()
    for shard in model.weights:
        yield shard, _merged(model, shard.parameter)


def export_weights(
    model: Model, rollout_dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, full tensor) of buffers and weights on rank 0, in a fixed order.

    Weights are in the model's dtype. Collective over the world, as `gather` is. Raises
    WeightRangeError, on all ranks and before the first tensor, for weights that are not finite or out
    of range for `rollout_dtype`, to which they will be cast (default: the model's dtype).
    """
    # First of all: a server that has taken half of the tensors cannot go back to the last version.
    _check_range(model, rollout_dtype or model.dtype)
    # The same tensors as `local_shards`, in the same order: what is merged there is merged here.
    yield from gather(model, model.buffers, torch.Tensor.detach, torch.float32)
    yield from gather(model, model.weights, lambda p: _merged(model, p), model.dtype)


@torch.no_grad()
def gather(
    model: Model, shards: Shards, value: Value, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, full tensor) on rank 0 of a value that each of `shards` has.

    dtype: of the values. Collective over the world: every rank must exhaust it; the others yield
    nothing. One tensor of one expert is gathered at a time: all that a rank holds beside its shards.
    """
    stages = _stage_tensors(model, shards)
    # Chunk by chunk, and within it stage by stage: the order of the model's layers.
    for chunk, local in enumerate(shards.by_chunk):
        for stage, stage_tensors in enumerate(stages):
            for i, hf_tensors in enumerate(stage_tensors[chunk]):
                tensors: Iterator[torch.Tensor] = iter(())
                if hf_tensors and stage == model.world.pipeline.rank:
                    tensors = _full_tensors(model, local[i], value(local[i].parameter))
                yield from _to_rank0(model, stage, hf_tensors, tensors, dtype)


def drain(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Takes part in a gather on a rank that has no use for it."""
    for _ in tensors:
        pass


def _merged(model: Model, parameter: torch.Tensor) -> torch.Tensor:
    adapter = model.adapter_of.get(parameter)
    return parameter.detach() if adapter is None else adapter.merged(parameter)


def _stage_tensors(model: Model, shards: Shards) -> list[list[list[HFTensors]]]:
    """[stage][chunk][shard]: what each stage of this pipeline exports of such shards.

    Rank 0 must know shapes before it receives. They never change: collective over the pipeline the
    first time only.
    """
    if shards.stage_tensors is None:
        local = [[model.hf_tensors(shard) for shard in chunk] for chunk in shards.by_chunk]
        shards.stage_tensors = model.world.gather(local, model.world.pipeline)
    return shards.stage_tensors


def _to_rank0(
    model: Model,
    stage: int,
    hf_tensors: HFTensors,
    tensors: Iterator[torch.Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Sends full tensors from the first rank of a stage to rank 0, which yields them."""
    world = model.world
    if not world.is_rank0:
        for tensor in tensors:
            dist.send(tensor.contiguous(), 0)
        return
    for name, shape in hf_tensors:
        if stage == 0:  # rank 0's own
            yield name, next(tensors)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=world.device)
            dist.recv(tensor, world.leader_of(stage))
            yield name, tensor
    assert next(tensors, None) is None, "more tensors than hf_tensors has names"


def _full_tensors(model: Model, shard: Shard, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that `Model.hf_tensors` names, on the stage's first rank; nothing elsewhere."""
    # Data-parallel replicas hold the same: the first one sends.
    if model.replicas_of(shard).rank:
        return
    # Tensor-parallel shards are joined, and un-fused into what Hugging Face has: q, k, v; gate, up.
    shards = _gather_to_first(value, model.tensor_axis(shard))
    if not shards:
        return
    tensors = model.rule(shard).layout.join(shards, model.spec.shapes)
    del shards
    if not shard.is_expert:
        yield from tensors
        return
    # Each expert-parallel rank holds another expert under the same shard: one after the other.
    expert = model.world.expert
    for rank in range(expert.size):
        for tensor in tensors:
            if rank == expert.rank == 0:
                yield tensor
            elif expert.rank == 0:
                received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                dist.recv(received, group=expert.group, group_src=rank)
                yield received
            elif expert.rank == rank:
                dist.send(tensor.contiguous(), group=expert.group, group_dst=0)


def _gather_to_first(tensor: torch.Tensor, axis: Axis) -> list[torch.Tensor]:
    """The tensors of all ranks of an axis, on its first; nothing elsewhere."""
    if axis.size == 1:
        return [tensor]
    tensor = tensor.contiguous()
    gathered = None if axis.rank else [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.gather(tensor, gathered, group=axis.group, group_dst=0)
    return gathered or []


def _check_range(model: Model, rollout_dtype: torch.dtype) -> None:
    """Raises WeightRangeError on all ranks if any has a weight that servers cannot hold."""
    weight_limit, buffer_limit = torch.finfo(rollout_dtype).max, torch.finfo(torch.float32).max
    buffers = set(map(id, model.buffers))
    bad = []
    for shard, value in local_shards(model):
        largest = largest_magnitude(value)
        limit = buffer_limit if id(shard) in buffers else weight_limit
        if math.isnan(largest) or largest > limit:
            bad.append(f"{shard.name} reaches {largest:g}")
    counts = torch.tensor([float(len(bad))], device=model.world.device)
    dist.all_reduce(counts)
    if counts.item():
        local = f"; on rank {model.world.rank}: {', '.join(bad[:5])}" if bad else ""
        raise WeightRangeError(
            f"{int(counts.item())} parameter shard(s) hold values beyond {rollout_dtype} (largest number "
            f"{weight_limit:g}){local}. Nothing was published; the servers keep the last good version"
        )
