"""Collectives between ranks: is what arrives right, and how fast does it arrive?

Sizes and bandwidths are those of NCCL-tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): the
size is that of the larger buffer of a rank; algorithm bandwidth is size over time; bus bandwidth
corrects it by what the operation has to move, so that it can be held against the hardware's.
"""

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launch.pairs import exchange_in_pairs, judge_pairs
from megatron_fp16rl import platform
from megatron_fp16rl.recipe import TORCH_DTYPES, Layout

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.parallel import Axis

BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
    "send_recv": lambda ranks: 1.0,
}
OPERATIONS = tuple(BUS_FACTORS)
# What Megatron asks of each group in training.
GROUPS: dict[str, tuple[str, ...]] = {
    "world": OPERATIONS,
    "tensor": ("all_reduce", "all_gather", "reduce_scatter"),
    "pipeline": ("send_recv",),
    "expert": ("all_to_all",),
    "data": ("all_reduce", "all_gather", "reduce_scatter"),
}
_SHORT, _IN_A_ROW = 64 << 10, 10  # operations on at most so many bytes are timed ten at a time
_SLOW = 2.0  # times the median rank
_MARKS = 251  # whole numbers that fp16 and bf16 hold exactly
_KEPT_PAIRS = 100

Say = Callable[[str], None]


class WrongPayload(RuntimeError):
    """A collective did not bring what it should. The message names operation, rank and place."""


@dataclass(frozen=True)
class Sweep:
    """What is measured."""

    sizes: Sequence[int]  # bytes
    dtypes: Sequence[str] = ("fp16", "bf16", "fp32")
    groups: Sequence[str] = tuple(GROUPS)
    operations: Sequence[str] = OPERATIONS
    repeats: int = 10


@dataclass(frozen=True)
class Transfer:
    """One operation on its buffers, and what must then be in `result`."""

    call: Callable[[], None]
    source: torch.Tensor
    result: torch.Tensor
    expected: torch.Tensor


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    group: str
    operation: str
    dtype: str
    ranks: int
    bytes: int


def sizes(smallest: int, largest: int, factor: int) -> list[int]:
    """smallest, smallest * factor, ... up to largest."""
    found = [smallest]
    while found[-1] * factor <= largest:
        found.append(found[-1] * factor)
    return found


def measure(layout: Layout, sweep: Sweep, say: Say) -> dict[str, object]:
    """Measures every case on all ranks; the result is on all of them. Collective.

    All groups of a kind work at once, as they do in training. Raises WrongPayload.
    """
    axes, device = _axes(layout)
    mine: list[tuple[Case, list[float]]] = []
    left_out: list[dict[str, str]] = []
    for group in sweep.groups:
        if axes[group].size == 1:
            left_out.append({"group": group, "reason": "of one rank: nothing is sent"})
            continue
        for operation in (name for name in GROUPS[group] if name in sweep.operations):
            for dtype in sweep.dtypes:
                what = {"group": group, "operation": operation, "dtype": dtype}
                if reason := _refusal(operation, axes[group], dtype, device):
                    left_out.append({**what, "reason": reason})
                    continue
                say(" ".join(what.values()))
                mine += _by_size(what, axes[group], sweep, device)
    names = _names()
    say("every pair of ranks")
    pairs = sorted(exchange_in_pairs(names, device), key=lambda pair: pair["gb_per_s"])
    rows = _rows(mine, names)
    return {
        "backend": platform.current().COLLECTIVES,
        "layout": {name: axis.size for name, axis in axes.items()},
        "rows": rows,
        "pairs": {"count": len(pairs), "slowest": pairs[:_KEPT_PAIRS]},
        "outliers": outliers(rows, pairs),
        "left_out": left_out,
    }


def _by_size(
    what: dict[str, str], axis: "Axis", sweep: Sweep, device: torch.device
) -> Iterator[tuple[Case, list[float]]]:
    """Cases with the seconds of this rank's repeats."""
    for size in sweep.sizes:
        transfer = transfer_of(what["operation"], axis, size, what["dtype"], device)
        larger = max(transfer.source.nbytes, transfer.result.nbytes)
        case = Case(**what, ranks=axis.size, bytes=larger)
        check(case, transfer)
        yield case, _time(transfer, case.bytes, sweep.repeats)


def _rows(mine: Sequence[tuple[Case, list[float]]], names: Sequence[str]) -> list[dict]:
    """Of what each rank measured. Collective."""
    everyone: list[list[list[float]]] = [[] for _ in names]
    dist.all_gather_object(everyone, [seconds for _, seconds in mine])
    return [row(case, [rank[i] for rank in everyone], names) for i, (case, _) in enumerate(mine)]


def row(case: Case, seconds: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, object]:
    """A case's row. seconds: of each rank, of each repeat. An operation takes what its slowest rank does."""
    slowest = [max(repeat) for repeat in zip(*seconds, strict=True)]
    took = statistics.median(slowest)
    usual = [statistics.median(rank) for rank in seconds]
    limit = _SLOW * statistics.median(usual)
    algorithm = case.bytes / took / 1e9
    return {
        **vars(case),
        "latency_us": took * 1e6,
        "latency_us_low": min(slowest) * 1e6,
        "latency_us_high": max(slowest) * 1e6,
        "algorithm_gb_per_s": algorithm,
        "bus_gb_per_s": algorithm * BUS_FACTORS[case.operation](case.ranks),
        "slow_ranks": [name for name, own in zip(names, usual, strict=True) if own > limit],
    }


def outliers(rows: Sequence[dict], pairs: Sequence[dict]) -> list[str]:
    """Slow ranks, slow connections: who, and in what."""
    found = [f"{p.node + ' ' if p.node else ''}{p.what}" for p in judge_pairs(pairs)]
    largest: dict[tuple[str, str], dict] = {}
    for one in rows:  # of each group and operation the largest size: small ones are noise
        key = one["group"], one["operation"]
        if key not in largest or one["bytes"] >= largest[key]["bytes"]:
            largest[key] = one
    for (group, operation), one in largest.items():
        found += [
            f"{name} takes more than {_SLOW:g} times as long as the median rank in {operation} of "
            f"its {group} group ({one['bytes']} bytes, {one['dtype']})"
            for name in one["slow_ranks"]
        ]
    return found


def check(case: Case, transfer: Transfer) -> None:
    """Does the operation once. Raises WrongPayload unless what arrives is what must."""
    transfer.call()
    if torch.equal(transfer.result, transfer.expected):
        return
    place = int((transfer.result != transfer.expected).nonzero()[0])
    raise WrongPayload(
        f"{case.operation} of {case.bytes} bytes in {case.dtype} over the {case.ranks} ranks of a "
        f"{case.group} group gave rank {dist.get_rank()} ({socket.gethostname()}) the number "
        f"{transfer.result[place].item()} at {place}, not {transfer.expected[place].item()}: its "
        "results cannot be trusted, so they are not timed"
    )


def transfer_of(
    operation: str, axis: "Axis", size: int, dtype: str, device: torch.device
) -> Transfer:
    """An operation on at least `size` bytes, rounded up to equal parts of whole elements."""
    ranks, me, group = axis.size, axis.rank, axis.group
    kind = getattr(torch, TORCH_DTYPES[dtype])
    part = -(-size // (kind.itemsize * ranks))
    count = part * ranks
    place = torch.arange(count, device=device)
    empty = torch.empty(count, dtype=kind, device=device)

    def marks(elements: int, sender: int, receiver: int = 0) -> torch.Tensor:
        return ((place[:elements] + sender + 16 * receiver) % _MARKS).to(kind)

    total = (1 + place % 5).to(kind)
    share = total * (place % ranks == me)  # of each element one rank has all, the others nothing
    everyone = range(ranks)
    match operation:
        case "all_reduce":
            return Transfer(lambda: dist.all_reduce(share, group=group), share, share, total)
        case "reduce_scatter":
            out, mine = empty[:part], total[me * part : (me + 1) * part]
            return Transfer(
                lambda: dist.reduce_scatter_single(out, share, group=group), share, out, mine
            )
        case "all_gather":
            sent, expected = marks(part, me), torch.cat([marks(part, r) for r in everyone])
            return Transfer(
                lambda: dist.all_gather_into_tensor(empty, sent, group=group), sent, empty, expected
            )
        case "all_to_all":
            sent = torch.cat([marks(part, me, r) for r in everyone])
            expected = torch.cat([marks(part, r, me) for r in everyone])
            return Transfer(
                lambda: dist.all_to_all_single(empty, sent, group=group), sent, empty, expected
            )
        case "broadcast":
            expected = marks(count, 0)
            held = expected.clone() if me == 0 else empty.zero_()
            return Transfer(
                lambda: dist.broadcast(held, group=group, group_src=0), held, held, expected
            )
        case "send_recv":
            sent, expected = marks(count, me), marks(count, (me - 1) % ranks)
            return Transfer(lambda: _round(sent, empty, axis), sent, empty, expected)
    raise ValueError(f"there is no operation {operation!r}; there are {', '.join(OPERATIONS)}")


def _round(sent: torch.Tensor, received: torch.Tensor, axis: "Axis") -> None:
    """Each rank sends to the next and receives from the one before, as NCCL-tests' sendrecv does."""
    to, origin = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    operations = [
        dist.P2POp(dist.isend, sent, group=axis.group, group_peer=to),
        dist.P2POp(dist.irecv, received, group=axis.group, group_peer=origin),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _refusal(operation: str, axis: "Axis", dtype: str, device: torch.device) -> str | None:
    """Why the backend does not do an operation, found by asking for it; None if it does."""
    try:
        transfer_of(operation, axis, 8 * axis.size, dtype, device).call()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def _time(transfer: Transfer, size: int, repeats: int) -> list[float]:
    """Seconds of one operation, in each repeat, on this rank."""
    transfer.source.zero_()  # sums that are repeated would grow without end
    times = _IN_A_ROW if size <= _SHORT else 1
    found = []
    for _ in range(1 + repeats):  # the first is for warming up
        _settle(transfer.source)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(times):
            transfer.call()
        _settle(transfer.source)
        found.append((time.perf_counter() - began) / times)
    return found[1:]


def _settle(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _axes(layout: Layout) -> tuple[dict[str, "Axis"], torch.device]:
    """This rank's groups by name: Megatron's own, and the world."""
    platform.current().prepare_learner()
    from megatron_fp16rl.parallel import Axis, initialize

    world = initialize(layout, seed=0)
    whole = Axis(world.size, world.rank, dist.group.WORLD)
    return {
        "world": whole,
        "tensor": world.tensor,
        "pipeline": world.pipeline,
        "expert": world.expert,
        "data": world.data,
    }, world.device


def _names() -> list[str]:
    """Of all ranks, with their hosts."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
