"""Checks the nodes of a job before any model loads: `srun ... python -m launch.preflight RUN_DIR`

One process a node; they find each other by MPI. A node that differs from the others, or is slow, is named, with
the --exclude that keeps the next job off it.
"""

import faulthandler
import os
import re
import resource
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.bootstrap import BootstrapError, from_mpi, mpi_world
from launch.outcome import RECIPE_FILE
from megatron_fp16rl import platform
from megatron_fp16rl.platform import installed
from megatron_fp16rl.recipe import load
from megatron_fp16rl.utils import tcp_store

_TIMEOUT_S = 900
_LOCKABLE_BYTES = 1 << 30
_MESSAGE_BYTES, _REPEATS = 4 << 20, 10
_SLOW = 0.4  # of the usual speed

# Of a node: its name, versions, speed, and what is wrong with it alone.
Facts = dict[str, Any]
Problem = dict[str, str]  # node, what


def main() -> int:
    """Examines the nodes of this job; prints the report; returns 1 if a node is not fit."""
    # MPI waits for a missing node without a limit, and blocks Python's threads.
    faulthandler.dump_traceback_later(_TIMEOUT_S, exit=True)
    print(f"{socket.gethostname()} waits for the other nodes", file=sys.stderr, flush=True)
    slurm = load(Path(sys.argv[1]) / RECIPE_FILE).slurm
    try:
        from_mpi(slurm.interface if slurm else None)
    except BootstrapError as error:
        print(f"problem: {error}", file=sys.stderr)
        return 1
    world = mpi_world()
    facts = world.allgather(examine())
    for node, speed in zip(facts, _measure(), strict=True):
        node["gb_per_s"] = speed
    problems = compare(facts)
    if world.rank == 0:
        _print(facts, problems)
    return 1 if problems else 0


def examine() -> Facts:
    """Facts about this node, except its speed."""
    wrong = []
    if (lockable := _lockable()) is not None and lockable < _LOCKABLE_BYTES:
        wrong.append(
            f"its InfiniBand may lock {lockable >> 10} KiB of memory only, and NCCL fails; "
            "`ulimit -l unlimited` where you submit, since Slurm hands the limit on"
        )
    return {"node": socket.gethostname(), "versions": _versions(), "wrong": wrong}


def compare(facts: Sequence[Facts]) -> list[Problem]:
    """Problems of nodes, by themselves and compared with the others."""
    speed = sorted(node["gb_per_s"] for node in facts)[len(facts) * 3 // 4]
    names = {name: None for node in facts for name in node["versions"]}
    usual = {n: statistics.mode(node["versions"].get(n) for node in facts) for n in names}
    problems: list[Problem] = []
    for node in facts:
        texts = list(node["wrong"])
        for name in usual:
            if (own := node["versions"].get(name)) != usual[name]:
                there = usual[name] or "not there"
                texts.append(f"{name} is {own or 'not there'}, elsewhere {there}")
        if node["gb_per_s"] < _SLOW * speed:
            texts.append(f"exchanges {node['gb_per_s']:.2f} GB/s, others {speed:.2f}")
        problems += [{"node": node["node"], "what": text} for text in texts]
    return problems


def _measure() -> list[float]:
    """By node, the GB/s that it exchanges each way with the faster of its neighbours. Collective.

    The nodes are a ring, and its connections are measured one after the other: a slow node has two slow ones.
    """
    current = platform.current()
    if current.NAME == "cuda":
        torch.cuda.set_device(current.device())
    tcp_store.init_process_group(current.COLLECTIVES)
    rank, count = dist.get_rank(), dist.get_world_size()
    message = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=current.device())
    speeds = torch.zeros(count, device=current.device())
    for first in range(count if count > 1 else 0):
        second = (first + 1) % count
        if rank in (first, second):
            other = second if rank == first else first
            seconds = min(exchange(message, other) for _ in range(_REPEATS))
            speeds[rank] = max(speeds[rank].item(), _MESSAGE_BYTES / seconds / 1e9)
        dist.barrier()
    dist.all_reduce(speeds)
    dist.destroy_process_group()
    return speeds.tolist()


def exchange(message: torch.Tensor, other: int) -> float:
    """Seconds to send a message to another rank while receiving its."""
    received = torch.empty_like(message)
    began = time.perf_counter()
    operations = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    if message.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _versions() -> dict[str, str]:
    """Of all that must be the same on all nodes: packages, devices, driver, and NCCL's settings."""
    versions = installed.versions()
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        # "Kernel Module  580.65.06", or "Open Kernel Module for x86_64  580.65.06"
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
        versions["devices"] = ", ".join(devices)
        versions["driver"] = driver[1] if driver else "unknown"
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    # Interfaces may have other names on other nodes.
    nccl = {
        n: v for n, v in os.environ.items() if n.startswith("NCCL_") and n != "NCCL_SOCKET_IFNAME"
    }
    return {**versions, **nccl}


def _lockable() -> int | None:
    """How much memory may be locked, bytes; None where there is no limit, or no InfiniBand that needs it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = any(Path("/sys/class/infiniband").glob("*"))
    return limit if adapters and limit != resource.RLIM_INFINITY else None


def _print(facts: Sequence[Facts], problems: Sequence[Problem]) -> None:
    for node in facts:
        print(
            f"{node['node']}: {node['versions'].get('devices', 'no GPU')}, {node['gb_per_s']:.2f} GB/s"
        )
    for problem in problems:
        print(f"problem: {problem['node']} {problem['what']}")
    bad = ",".join(sorted({problem["node"] for problem in problems}))
    remedy = f"remedy: fix, or submit again with --exclude={bad} (slurm.options.exclude)"
    print(remedy if bad else "preflight: all well")


if __name__ == "__main__":
    sys.exit(main())
