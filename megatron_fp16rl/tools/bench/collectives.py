"""Collectives between ranks: whether the payload arrives unchanged, and how fast.

Sizes and bandwidths are those of NCCL-tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): the
size is that of a rank's larger buffer; algorithm bandwidth is size over time; bus bandwidth corrects
it by what the operation has to move, so that it compares with the hardware's.
"""

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.recipe import TORCH_DTYPES, Layout
from megatron_fp16rl.tools.bench.common import Result, Say, View, spread

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.parallel import Axis

VIEW = View(
    "{ranks} ranks, {backend}; bus: bus bandwidth, GB/s",
    {
        "group": "{group} {ranks}",
        "operation": "{operation}",
        "dtype": "{dtype}",
        "bytes": "{bytes:,}",
        "µs": "{latency_us:,.0f}",
        "spread": "{latency_us_low:,.0f}-{latency_us_high:,.0f}",
        "GB/s": "{algorithm_gb_per_s:.3f}",
        "bus": "{bus_gb_per_s:.3f}",
        "slow ranks": "{slow_ranks}",
    },
)
BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
    "send_recv": lambda ranks: 1.0,
}
OPERATIONS = tuple(BUS_FACTORS)
# The operations that Megatron uses in each group.
GROUPS: dict[str, tuple[str, ...]] = {
    "world": OPERATIONS,
    "tensor": ("all_reduce", "all_gather", "reduce_scatter"),
    "pipeline": ("send_recv",),
    "expert": ("all_to_all",),
    "data": ("all_reduce", "all_gather", "reduce_scatter"),
}
_SHORT, _IN_A_ROW = 64 << 10, 10  # up to this many bytes, ten operations are timed together
_SLOW = 2.0  # times the median rank's time
_MODULUS = 251  # payloads are smaller integers, which fp16 and bf16 hold exactly


class WrongPayload(RuntimeError):
    """A collective delivered other numbers than it should."""


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
    """One operation on its buffers, and what `result` must hold afterwards."""

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
    steps = [smallest]
    while steps[-1] * factor <= largest:
        steps.append(steps[-1] * factor)
    return steps


def measure(layout: Layout, sweep: Sweep, say: Say) -> Result:
    """Measures every case on all ranks; all have the result. Collective. Raises WrongPayload.

    All groups of a kind work at the same time, as they do in training.
    """
    axes, device = _axes(layout)
    measured: list[tuple[Case, list[float]]] = []
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
                measured += _by_size(what, axes[group], sweep, device)
    return {
        "backend": platform.current().COLLECTIVES,
        "ranks": dist.get_world_size(),
        "layout": {name: axis.size for name, axis in axes.items()},
        "rows": _gather_rows(measured),
        "left_out": left_out,
    }


def _by_size(
    what: dict[str, str], axis: "Axis", sweep: Sweep, device: torch.device
) -> Iterator[tuple[Case, list[float]]]:
    """Checks and times each size; yields the case and the seconds of this rank's repeats."""
    for size in sweep.sizes:
        transfer = transfer_of(what["operation"], axis, size, what["dtype"], device)
        larger = max(transfer.source.nbytes, transfer.result.nbytes)
        case = Case(**what, ranks=axis.size, bytes=larger)
        check(case, transfer)
        yield case, _time(transfer, case.bytes, sweep.repeats)


def _gather_rows(measured: Sequence[tuple[Case, list[float]]]) -> list[Result]:
    """Makes rows from every rank's measurements. Collective."""
    name = f"rank {dist.get_rank()} ({socket.gethostname()})"
    ranks: list[tuple[str, list[list[float]]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(ranks, (name, [seconds for _, seconds in measured]))
    names = [name for name, _ in ranks]
    return [
        row(case, [seconds[i] for _, seconds in ranks], names)
        for i, (case, _) in enumerate(measured)
    ]


def row(case: Case, seconds: Sequence[Sequence[float]], names: Sequence[str]) -> Result:
    """A case's row. seconds: [rank][repeat]; an operation takes as long as its slowest rank."""
    slowest = [max(repeat) for repeat in zip(*seconds, strict=True)]
    medians = [statistics.median(repeats) for repeats in seconds]
    limit = _SLOW * statistics.median(medians)
    bandwidth = case.bytes / statistics.median(slowest) / 1e9
    return {
        **vars(case),
        **spread("latency_us", [1e6 * s for s in slowest]),
        "algorithm_gb_per_s": bandwidth,
        "bus_gb_per_s": bandwidth * BUS_FACTORS[case.operation](case.ranks),
        "slow_ranks": [name for name, own in zip(names, medians, strict=True) if own > limit],
    }


def check(case: Case, transfer: Transfer) -> None:
    """Runs the operation once. Raises WrongPayload unless it delivers the expected payload."""
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
    index = torch.arange(count, device=device)
    empty = torch.empty(count, dtype=kind, device=device)

    def payload(elements: int, sender: int, receiver: int = 0) -> torch.Tensor:
        return ((index[:elements] + sender + 16 * receiver) % _MODULUS).to(kind)

    total = (1 + index % 5).to(kind)
    share = total * (index % ranks == me)  # each element is on one rank, the others add zero
    match operation:
        case "all_reduce":
            return Transfer(lambda: dist.all_reduce(share, group=group), share, share, total)
        case "reduce_scatter":
            out, own = empty[:part], total[me * part : (me + 1) * part]
            return Transfer(
                lambda: dist.reduce_scatter_single(out, share, group=group), share, out, own
            )
        case "all_gather":
            sent = payload(part, me)
            expected = torch.cat([payload(part, r) for r in range(ranks)])
            return Transfer(
                lambda: dist.all_gather_into_tensor(empty, sent, group=group), sent, empty, expected
            )
        case "all_to_all":
            sent = torch.cat([payload(part, me, r) for r in range(ranks)])
            expected = torch.cat([payload(part, r, me) for r in range(ranks)])
            return Transfer(
                lambda: dist.all_to_all_single(empty, sent, group=group), sent, empty, expected
            )
        case "broadcast":
            expected = payload(count, 0)
            held = expected.clone() if me == 0 else empty.zero_()
            return Transfer(
                lambda: dist.broadcast(held, group=group, group_src=0), held, held, expected
            )
        case "send_recv":
            sent, expected = payload(count, me), payload(count, (me - 1) % ranks)
            return Transfer(lambda: _send_recv(sent, empty, axis), sent, empty, expected)
    raise ValueError(f"there is no operation {operation!r}; there are {', '.join(OPERATIONS)}")


def _send_recv(sent: torch.Tensor, received: torch.Tensor, axis: "Axis") -> None:
    """Sends to the next rank and receives from the previous one, as NCCL-tests' sendrecv does."""
    to, origin = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    operations = [
        dist.P2POp(dist.isend, sent, group=axis.group, group_peer=to),
        dist.P2POp(dist.irecv, received, group=axis.group, group_peer=origin),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _refusal(operation: str, axis: "Axis", dtype: str, device: torch.device) -> str | None:
    """Tries an operation; returns the backend's reason if it does not support it."""
    try:
        transfer_of(operation, axis, 8 * axis.size, dtype, device).call()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def _time(transfer: Transfer, size: int, repeats: int) -> list[float]:
    """Seconds of one operation on this rank, in each repeat."""
    transfer.source.zero_()  # repeated sums would overflow
    times = _IN_A_ROW if size <= _SHORT else 1
    seconds = []
    for _ in range(1 + repeats):  # the first warms up
        _synchronize(transfer.source)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(times):
            transfer.call()
        _synchronize(transfer.source)
        seconds.append((time.perf_counter() - began) / times)
    return seconds[1:]


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _axes(layout: Layout) -> tuple[dict[str, "Axis"], torch.device]:
    """This rank's groups by name: the world, and Megatron's own."""
    platform.current().prepare_learner()
    from megatron_fp16rl.parallel import Axis, initialize

    world = initialize(layout, seed=0)
    own = {name: getattr(world, name) for name in GROUPS if name != "world"}
    return {"world": Axis(world.size, world.rank, dist.group.WORLD), **own}, world.device
