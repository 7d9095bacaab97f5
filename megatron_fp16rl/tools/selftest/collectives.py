"""Row collectives: what arrives between ranks, and how fast, by operation and by pair."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from launch.preflight import exchange
from megatron_fp16rl import platform
from megatron_fp16rl.parallel import Axis
from megatron_fp16rl.tools.selftest import ranks
from megatron_fp16rl.tools.selftest.result import (
    Check,
    NotHere,
    Setting,
    at_least,
    equal,
    shown,
)
from megatron_fp16rl.utils import tcp_store

_BYTES, _FEW = 64 << 20, 1 << 20
_REPEATS = 5
_SLOWEST = 0.5
_TIMEOUT_S = 300
_DTYPES = (torch.float16, torch.float32, torch.int32, torch.bool)


def collectives(setting: Setting) -> list[Check]:
    """Sums and copies of four types, bandwidths of the world's collectives, and of each pair of ranks."""
    machines, _ = ranks.nodes()
    count = ranks.here()
    if machines * count < 2:
        raise NotHere("1 GPU: there is nobody to speak to")
    on_gpu = platform.current().NAME == "cuda"
    size = _FEW if setting.quick or not on_gpu else _BYTES
    found = ranks.run(
        *(count, "collectives.rank", setting.folder / "ranks"),
        {"size": size},
        everywhere=True,
    )
    return judge(found, size, on_gpu)


class Pair(NamedTuple):
    """Two ranks, whether they are on one machine, and bytes a second each way at once."""

    first: int
    second: int
    together: bool
    bytes_per_s: float


def judge(found: Sequence[dict[str, Any]], size: int, have_links: bool) -> list[Check]:
    """found: what this machine's ranks saw; all pairs are in each. have_links: else pairs wait for processors."""
    wrong = sorted({name for one in found for name in one["wrong"]})
    checks = [equal("operations that brought other numbers", ", ".join(wrong) or "none", "none")]
    checks += [
        shown(f"GB/s of the bus, {name}, {size >> 20} MiB", value / 1e9)
        for name, value in found[0]["bandwidths"].items()
    ]
    pairs = [Pair(*pair) for pair in found[0]["pairs"]]
    for together, where in ((True, "of a machine"), (False, "of two machines")):
        if kind := [pair for pair in pairs if pair.together == together]:
            usual = statistics.median(pair.bytes_per_s for pair in kind)
            slowest = min(kind, key=lambda pair: pair.bytes_per_s)
            share, name = slowest.bytes_per_s / usual, f"slowest pair {where} over a usual one"
            checks += [
                shown(f"GB/s of a usual pair {where}", usual / 1e9),
                at_least(name, share, _SLOWEST) if have_links else shown(name, share),
                shown(f"that pair {where}", f"ranks {slowest.first} and {slowest.second}"),
            ]
    return checks


def rank(size: int) -> dict[str, Any]:
    """On one rank: names of operations whose result was wrong, bandwidths by operation, all pairs."""
    backend = platform.current()
    backend.prepare_learner()
    from megatron_fp16rl.tools.bench.collectives import BUS_FACTORS, row, timed

    tcp_store.init_process_group(backend.COLLECTIVES, _TIMEOUT_S)
    device, group = backend.device(), dist.group.WORLD
    assert group is not None
    world = Axis(dist.get_world_size(), dist.get_rank(), group)
    bandwidths = {}
    for operation in BUS_FACTORS:
        seconds, sent = timed(operation, world, size, "fp16", _REPEATS, device)
        bandwidths[operation] = 1e9 * row(operation, world.size, sent, seconds)["bus_gb_per_s"]
    return {
        "wrong": _wrong(world.size, world.rank, device),
        "bandwidths": bandwidths,
        "pairs": _pairs(world.size, world.rank, size, device),
    }


def _wrong(size: int, own: int, device: torch.device) -> list[str]:
    """Of numbers whose sums every type holds."""
    wrong = []
    for dtype in _DTYPES:
        whole = torch.arange(4 * size, device=device)
        mine = (whole % 2 + (own == size - 1)).to(dtype)
        everyone = [(whole % 2 + (one == size - 1)).to(dtype) for one in range(size)]
        gathered = torch.empty(size * len(mine), dtype=dtype, device=device)
        dist.all_gather_into_tensor(gathered, mine)
        sent = mine.clone()
        dist.broadcast(sent, size - 1)
        results = {
            "all_gather": (gathered, torch.cat(everyone)),
            "broadcast": (sent, everyone[-1]),
        }
        if dtype is not torch.bool:
            total = torch.stack(everyone).sum(0).to(dtype)
            summed, part = mine.clone(), torch.empty(4, dtype=dtype, device=device)
            dist.all_reduce(summed)
            dist.reduce_scatter_tensor(part, mine)
            results |= {
                "all_reduce": (summed, total),
                "reduce_scatter": (part, total[4 * own : 4 * own + 4]),
            }
        name = str(dtype).removeprefix("torch.")
        wrong += [f"{key} of {name}" for key, two in results.items() if not torch.equal(*two)]
    return wrong


def _pairs(size: int, own: int, sent: int, device: torch.device) -> list[Pair]:
    """Each pair sends both ways at once; as many pairs as there are work side by side."""
    buffer = torch.zeros(sent, dtype=torch.uint8, device=device)
    mine: list[tuple[int, int, float]] = []
    for partners in rounds(size):
        dist.barrier()
        if (partner := partners.get(own)) is None:
            continue
        seconds = [exchange(buffer, partner) for _ in range(1 + _REPEATS)]
        if own < partner:
            mine.append((own, partner, sent / statistics.median(seconds[1:])))
    machines: list[Any] = [None] * size
    dist.all_gather_object(machines, ranks.machine())
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, mine)
    return [
        Pair(a, b, machines[a] == machines[b], bandwidth)
        for of_rank in gathered
        for a, b, bandwidth in of_rank
    ]


def rounds(size: int) -> Iterator[dict[int, int]]:
    """The partner of each rank in each round, so that every two meet once (the circle method)."""
    seats: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        met = [(a, b) for a, b in pairs if a is not None and b is not None]
        yield {**dict(met), **{b: a for a, b in met}}
        seats = [seats[0], seats[-1], *seats[1:-1]]
