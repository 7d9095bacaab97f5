"""Bus bandwidth between the learner's ranks, as NCCL-tests count it (doc/PERFORMANCE.md there).

Algorithm bandwidth is the bytes of the larger buffer over the seconds; bus bandwidth corrects it by what
the operation has to move, so that it compares with the hardware's.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.parallel import Axis, initialize
from megatron_fp16rl.recipe import TORCH_DTYPES, Recipe
from megatron_fp16rl.tools.bench.common import Result, Say, spread

BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
}


def measure(recipe: Recipe, sizes: list[int], repeats: int, say: Say) -> Result:
    """Times each operation over the world and each of Megatron's groups. Collective.

    All groups of a kind work at the same time, as they do in training. sizes: bytes.
    """
    world, dtype = initialize(recipe.learner, seed=0), recipe.precision.dtype
    everyone: Any = dist.group.WORLD
    axes = {
        "world": Axis(world.size, world.rank, everyone),
        "tensor": world.tensor,
        "pipeline": world.pipeline,
        "context": world.context,
        "expert": world.expert,
        "data": world.data,
    }
    rows: list[Result] = []
    for group, axis in axes.items():
        for operation in BUS_FACTORS if axis.size > 1 else ():
            say(f"{group} {operation}")
            for size in sizes:
                case: Result = {"group": group, "operation": operation, "ranks": axis.size}
                seconds, sent = timed(operation, axis, size, dtype, repeats, world.device)
                rows.append(case | row(operation, axis.size, sent, seconds))
    return {
        "backend": platform.current().COLLECTIVES,
        "ranks": world.size,
        "dtype": dtype,
        "layout": {name: axis.size for name, axis in axes.items()},
        "rows": rows,
    }


def row(operation: str, ranks: int, size: int, seconds: list[float]) -> Result:
    """Latency and bandwidths of repeats, each as long as its slowest rank took."""
    latency = spread("latency_us", [1e6 * s for s in seconds])
    bandwidth = size / latency["latency_us"] / 1e3
    bus = bandwidth * BUS_FACTORS[operation](ranks)
    return {"bytes": size, **latency, "algorithm_gb_per_s": bandwidth, "bus_gb_per_s": bus}


def timed(
    operation: str, axis: Axis, size: int, dtype: str, repeats: int, device: torch.device
) -> tuple[list[float], int]:
    """Seconds of each repeat on the slowest rank, the same on every rank; and bytes. Collective.

    `size` is rounded up to equal shares of the ranks.
    """
    kind = getattr(torch, TORCH_DTYPES[dtype])
    count = -(-size // (kind.itemsize * axis.size))
    buffer = torch.zeros(count * axis.size, dtype=kind, device=device)
    share = torch.zeros(count, dtype=kind, device=device)
    seconds = torch.zeros(1 + repeats, dtype=torch.float64, device=device)
    for i in range(1 + repeats):  # the first warms up
        dist.barrier()
        began = time.perf_counter()
        match operation:
            case "all_reduce":
                dist.all_reduce(buffer, group=axis.group)
            case "all_gather":
                dist.all_gather_into_tensor(buffer, share, group=axis.group)
            case "reduce_scatter":
                dist.reduce_scatter_tensor(share, buffer, group=axis.group)
            case "broadcast":
                dist.broadcast(buffer, group=axis.group, group_src=0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[i] = time.perf_counter() - began
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds[1:].tolist(), buffer.nbytes
