"""Batches between the ranks of a learner: as tensors, and each rank gets what it needs and no more.

Records of experts (Batch.experts) can be gigabytes. They stay on the host; on their way they are on the
device, which is where collectives want them, in parts of `_STAGED` bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.parallel import Axis, World

_STAGED = 8 << 20
B = TypeVar("B", bound=Batch)


def from_leader(batch: Batch | None, world: World, layers: Sequence[int] | None) -> Batch:
    """The leader's batch on every rank of its replica, on the device. Collective over the replica.

    batch: that of another rank than the leader is not looked at. layers: of the model, those whose
    experts this rank replays: the only ones of which it gets a record; None: it gets no record.
    """
    tensors = batch.tensors() if world.is_leader else {}
    records = tensors.pop("experts", None)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    shapes, recorded = world.broadcast_from_leader(
        (shapes, None if records is None else (records.shape, records.dtype))
    )
    shared = {}
    for name, (shape, dtype) in shapes.items():
        if world.is_leader:
            shared[name] = tensors[name].to(world.device).contiguous()
        else:
            shared[name] = torch.empty(shape, dtype=dtype, device=world.device)
        _broadcast(shared[name], world.replica)
    if layers is not None and recorded is not None:
        shared["experts"] = _records_from_leader(records, recorded, world, list(layers))
    return Batch(**shared)


def _records_from_leader(
    records: torch.Tensor | None,
    recorded: tuple[torch.Size, torch.dtype],
    world: World,
    layers: list[int],
) -> torch.Tensor:
    """[batch, seq, layers of this rank, top_k], by way of the first tensor-parallel rank of its stage.

    records: the leader's, of all layers; recorded: their shape and dtype.
    """
    (batch, seq, _, top_k), dtype = recorded
    pipeline, device = world.pipeline, world.device
    if world.is_leader:
        mine = records[:, :, layers].contiguous()
    else:
        mine = torch.empty(batch, seq, len(layers), top_k, dtype=dtype)
    if world.tensor.rank == 0 and pipeline.size > 1:
        stages: list[list[int] | None] = [None] * pipeline.size
        dist.all_gather_object(stages, layers, group=pipeline.group)
        for stage in range(1, pipeline.size):
            size = seq * len(stages[stage]) * top_k * dtype.itemsize
            for rows in _parts(batch, size) if pipeline.rank in (0, stage) else ():
                if pipeline.rank:
                    part = torch.empty_like(mine[rows], device=device)
                    _pass_on(dist.irecv, part, pipeline, 0)
                    mine[rows] = part.cpu()
                else:
                    part = records[rows][:, :, stages[stage]].contiguous().to(device)
                    _pass_on(dist.isend, part, pipeline, stage)
    if world.tensor.size > 1:
        for rows in _parts(batch, mine[0].nbytes):
            part = mine[rows].to(device)
            _broadcast(part, world.tensor)
            mine[rows] = part.cpu()
    return mine


def everywhere(lengths: torch.Tensor, data: Axis) -> list[int]:
    """The lengths [batch] of all ranks' sequences, rank by rank. Each rank must have as many."""
    parts = [torch.empty_like(lengths) for _ in range(data.size)]
    dist.all_gather(parts, lengths.contiguous(), group=data.group)
    return torch.cat(parts).tolist()


def moved(batch: B, shares: list[list[int]], seq: int, world: World) -> B:
    """The sequences of this rank's share, in its order, from the data-parallel ranks that have them.

    shares: for each of these ranks, sequences by their place in `everywhere`, as many as it has now.
    seq: tokens of the longest of all. Collective; no rank ever holds more than its own share.
    """
    data, count = world.data, len(batch)
    if data.size == 1:
        return batch.rows(shares[0], seq)
    batch = batch.rows(range(count), seq).padded(count, seq)
    return batch.replace(
        **{name: _dealt_out(value, shares, world) for name, value in batch.tensors().items()}
    )


def _dealt_out(value: torch.Tensor, shares: list[list[int]], world: World) -> torch.Tensor:
    """[batch, ...]: of one tensor of a batch, what `moved` says, in rounds of `_STAGED` bytes."""
    data, count = world.data, len(value)
    sent = [[i % count for i in share if i // count == data.rank] for share in shares]
    mine = list(enumerate(shares[data.rank]))
    got = [[at for at, i in mine if i // count == rank] for rank in range(data.size)]
    arrived, size = torch.empty_like(value), value[0].nbytes
    if not size:  # records of a stage that has no router
        return arrived
    # Of the rows that one rank has for another: all ranks make as many rounds.
    most = max(sum(i // count == r for i in share) for share in shares for r in range(data.size))
    at_once = max(1, _STAGED // (data.size * size))
    for start in range(0, most, at_once):
        out = [rows[start : start + at_once] for rows in sent]
        come = [rows[start : start + at_once] for rows in got]
        leaving = value[list(chain(*out))].to(world.device)
        coming = torch.empty(
            (sum(map(len, come)), *value.shape[1:]), dtype=value.dtype, device=world.device
        )
        dist.all_to_all_single(
            _bytes(coming),
            _bytes(leaving),
            [len(rows) * size for rows in come],
            [len(rows) * size for rows in out],
            group=data.group,
        )
        arrived[list(chain(*come))] = coming.to(value.device)
    return arrived


def _parts(count: int, size: int) -> Iterator[slice]:
    """Rows of `size` bytes, as many at a time as may be on the device; none if they are empty."""
    at_once = max(1, _STAGED // size) if size else count
    return (slice(at, at + at_once) for at in range(0, count if size else 0, at_once))


def _pass_on(way: Callable, tensor: torch.Tensor, axis: Axis, peer: int) -> None:
    """Sends or receives over the group's own communicator; a plain send makes one for each pair."""
    for work in dist.batch_isend_irecv(
        [dist.P2POp(way, _bytes(tensor), None, axis.group, 0, peer)]
    ):
        work.wait()


def _broadcast(tensor: torch.Tensor, axis: Axis) -> None:
    """From the first rank of an axis, in place."""
    if axis.size > 1:
        dist.broadcast(_bytes(tensor), group=axis.group, group_src=0)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8: a view of a contiguous tensor; neither NCCL nor gloo knows int16."""
    return tensor.view(-1).view(torch.uint8)
