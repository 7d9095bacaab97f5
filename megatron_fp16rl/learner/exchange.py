"""Moves batches between the ranks of a learner: each rank gets the sequences and layers it needs, no more.

Records of experts (Batch.experts) can be gigabytes. They stay on the host; collectives need them on
the device, so they pass through it in chunks of `_CHUNK_BYTES`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.parallel import Axis, World

_CHUNK_BYTES = 8 << 20
B = TypeVar("B", bound=Batch)


def from_leader(batch: Batch | None, world: World, layers: Sequence[int] | None) -> Batch:
    """The leader's batch on every rank of its replica, on the device. Collective over the replica.

    batch: ignored on other ranks than the leader. layers: of the model, those that this rank replays:
    it gets the records of their experts; None: it gets none.
    """
    tensors = batch.tensors() if world.is_leader and batch is not None else {}
    records = tensors.pop("experts", None)
    # Shapes first: the other ranks allocate, then receive tensor by tensor.
    shapes, record_shape = world.broadcast_from_leader(
        (
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()},
            None if records is None else (records.shape, records.dtype),
        )
    )
    shared = {}
    for name, (shape, dtype) in shapes.items():
        if world.is_leader:
            shared[name] = tensors[name].to(world.device).contiguous()
        else:
            shared[name] = torch.empty(shape, dtype=dtype, device=world.device)
        _broadcast(shared[name], world.replica)
    if layers is not None and record_shape is not None:
        shared["experts"] = _records_from_leader(records, record_shape, world, list(layers))
    return Batch(**shared)


def _records_from_leader(
    records: torch.Tensor | None,
    record_shape: tuple[torch.Size, torch.dtype],
    world: World,
    layers: list[int],
) -> torch.Tensor:
    """[batch, seq, layers of this rank, top_k]: to the first rank of each stage, then within the stage: to its
    context-parallel ranks, and from each to the tensor-parallel ones.

    records: the leader's, of all layers; None on other ranks. record_shape: their shape and dtype.
    """
    (batch, seq, _, top_k), dtype = record_shape
    pipeline, device = world.pipeline, world.device
    if records is not None:
        local = records[:, :, layers].contiguous()
    else:
        local = torch.empty(batch, seq, len(layers), top_k, dtype=dtype)
    if world.tensor.rank == world.context.rank == 0 and pipeline.size > 1:
        stages = world.gather(layers, pipeline)
        for stage in range(1, pipeline.size):
            size = seq * len(stages[stage]) * top_k * dtype.itemsize
            for rows in _chunks(batch, size) if pipeline.rank in (0, stage) else ():
                if records is None:
                    part = torch.empty_like(local[rows], device=device)
                    _transfer(dist.irecv, part, pipeline, 0)
                    local[rows] = part.cpu()
                else:
                    part = records[rows][:, :, stages[stage]].contiguous().to(device)
                    _transfer(dist.isend, part, pipeline, stage)
    within = [world.context] if world.tensor.rank == 0 else []
    for axis in [*within, world.tensor]:
        for rows in _chunks(batch, local[0].nbytes) if axis.size > 1 else ():
            part = local[rows].to(device)
            _broadcast(part, axis)
            local[rows] = part.cpu()
    return local


def all_lengths(lengths: torch.Tensor, data: Axis) -> list[int]:
    """The lengths [batch] of all ranks' sequences, rank by rank. Each rank must have as many."""
    parts = [torch.empty_like(lengths) for _ in range(data.size)]
    dist.all_gather(parts, lengths.contiguous(), group=data.group)
    return torch.cat(parts).tolist()


def redistribute(batch: B, shares: list[list[int]], seq: int, world: World) -> B:
    """The sequences of this rank's share, in its order, from the data-parallel ranks that hold them.

    shares: for each of these ranks, sequences by their index in `all_lengths`, as many as it holds now.
    seq: tokens of the longest of all. Collective; no rank ever holds more than its own share.
    """
    data, count = world.data, len(batch)
    if data.size == 1:
        return batch.rows(shares[0], seq)
    batch = batch.rows(range(count), seq).padded(count, seq)
    return batch.replace(
        **{name: _redistribute(value, shares, world) for name, value in batch.tensors().items()}
    )


def _redistribute(value: torch.Tensor, shares: list[list[int]], world: World) -> torch.Tensor:
    """[batch, ...]: one tensor of a batch, in rounds of at most `_CHUNK_BYTES`."""
    data, count = world.data, len(value)
    local_share = list(enumerate(shares[data.rank]))
    # By peer: rows of `value` to send to it, and rows of `result` to receive from it.
    send_rows = [[i % count for i in share if i // count == data.rank] for share in shares]
    receive_rows = [[at for at, i in local_share if i // count == r] for r in range(data.size)]
    result, size = torch.empty_like(value), value[0].nbytes
    if not size:  # records of a stage that has no router
        return result
    # All ranks run as many rounds as the largest transfer between any two of them takes.
    most = max(sum(i // count == r for i in share) for share in shares for r in range(data.size))
    step = max(1, _CHUNK_BYTES // (data.size * size))
    for start in range(0, most, step):
        to_send = [rows[start : start + step] for rows in send_rows]
        to_receive = [rows[start : start + step] for rows in receive_rows]
        sent = value[list(chain(*to_send))].to(world.device)
        received = torch.empty(
            (sum(map(len, to_receive)), *value.shape[1:]), dtype=value.dtype, device=world.device
        )
        dist.all_to_all_single(
            _bytes(received),
            _bytes(sent),
            [len(rows) * size for rows in to_receive],
            [len(rows) * size for rows in to_send],
            group=data.group,
        )
        result[list(chain(*to_receive))] = received.to(value.device)
    return result


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` rows of `size` bytes that fit a chunk; none if the rows are empty."""
    step = max(1, _CHUNK_BYTES // size) if size else count
    return (slice(at, at + step) for at in range(0, count if size else 0, step))


def _transfer(operation: Callable, tensor: torch.Tensor, axis: Axis, peer: int) -> None:
    """Sends or receives over the group's own communicator; a plain send makes one for each pair."""
    operations = [dist.P2POp(operation, _bytes(tensor), None, axis.group, 0, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _broadcast(tensor: torch.Tensor, axis: Axis) -> None:
    """From the first rank of an axis, in place."""
    if axis.size > 1:
        dist.broadcast(_bytes(tensor), group=axis.group, group_src=0)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8: a view of a contiguous tensor; neither NCCL nor gloo supports int16."""
    return tensor.view(-1).view(torch.uint8)
