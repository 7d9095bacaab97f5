"""How fast each pair of nodes, or of ranks, exchanges: slow connections, and the nodes to blame for them."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_SLOW = 0.5  # of the median speed
_MESSAGE_BYTES = 4 << 20
_REPEATS = 3
_SECOND_LOOKS = 2

Pair = dict[str, Any]  # nodes: two names, gb_per_s: each way, latency_us


@dataclass(frozen=True)
class Problem:
    """Something that makes a run fail, slow or wrong."""

    node: str | None  # None: a slow connection, for which no node is to blame; the run goes on
    what: str


def exchange_in_pairs(names: Sequence[str], device: torch.device) -> list[Pair]:
    """Exchanges 4 MiB both ways at once in each pair of ranks, several pairs at a time. Collective.

    names: of all ranks. Pairs that seem slow are measured again alone: other traffic is not their fault.
    """
    pairs = _measure(names, device, rounds(len(names)))
    for _ in range(_SECOND_LOOKS):
        _, slow = _slow_pairs(list(pairs.values()))
        again = _measure(names, device, [[ranks] for ranks, pair in pairs.items() if pair in slow])
        for ranks, pair in again.items():
            pairs[ranks] = max(pairs[ranks], pair, key=lambda p: p["gb_per_s"])
    return list(pairs.values())


def judge_pairs(pairs: Sequence[Pair]) -> list[Problem]:
    """Slow connections. A node is to blame if it is slow with most others."""
    usual, slow = _slow_pairs(pairs)
    nodes = {node for pair in pairs for node in pair["nodes"]}
    counts = {node: sum(node in pair["nodes"] for pair in slow) for node in nodes}
    blamed = sorted(node for node, count in counts.items() if count > (len(nodes) - 1) / 2)
    problems = []
    for node in blamed:
        what = f"is slow with {counts[node]} of {len(nodes) - 1} nodes (usual {usual:.2f} GB/s)"
        problems.append(Problem(node, what))
    for pair in slow:
        first, second = pair["nodes"]
        if first not in blamed and second not in blamed:
            speed = f"{pair['gb_per_s']:.2f} GB/s, usual {usual:.2f}"
            problems.append(Problem(None, f"{first} and {second} exchange {speed}"))
    return problems


def rounds(ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds in which each rank has one partner (the circle method)."""
    circle = list(range(ranks + ranks % 2))  # an odd rank pauses
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < ranks]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _slow_pairs(pairs: Sequence[Pair]) -> tuple[float, list[Pair]]:
    """The usual GB/s, and the pairs that are far slower. Fewer than three pairs tell nothing."""
    usual = statistics.median(pair["gb_per_s"] for pair in pairs) if pairs else 0.0
    return usual, [p for p in pairs if len(pairs) > 2 and p["gb_per_s"] < _SLOW * usual]


def _measure(
    names: Sequence[str], device: torch.device, turns: Iterable[Sequence[tuple[int, int]]]
) -> dict[tuple[int, int], Pair]:
    """By ranks, what each pair exchanges; the pairs of one turn at the same time. Equal on all ranks."""
    rank = dist.get_rank()
    large = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=device)
    measured: dict[tuple[int, int], Pair] = {}
    for turn in turns:
        for ranks in turn:
            if rank not in ranks:
                continue
            other = sum(ranks) - rank
            _exchange(large[:1], other)  # connects them
            latency = min(_exchange(large[:1], other) for _ in range(_REPEATS))
            seconds = min(_exchange(large, other) for _ in range(_REPEATS))
            if rank == ranks[0]:
                speed = {"gb_per_s": _MESSAGE_BYTES / seconds / 1e9, "latency_us": latency * 1e6}
                measured[ranks] = {"nodes": [names[r] for r in ranks], **speed}
        dist.barrier()
    everywhere: list[dict[tuple[int, int], Pair]] = [{} for _ in names]
    dist.all_gather_object(everywhere, measured)
    return {ranks: pair for part in everywhere for ranks, pair in part.items()}


def _exchange(message: torch.Tensor, other: int) -> float:
    """Seconds to send a message to another rank while receiving its."""
    received = torch.empty_like(message)
    began = time.perf_counter()
    operations = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    if message.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
