"""Before any model loads: are these nodes fit for the run? `srun ... python -m launch.preflight RUN_DIR`

One process a node; they find each other by MPI. A node that is unlike the others, or slow, is named, with the
--exclude that keeps the next job off it.
"""

import contextlib
import faulthandler
import importlib.metadata
import json
import os
import re
import resource
import secrets
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
from megatron_fp16rl.recipe import load
from megatron_fp16rl.utils import tcp_store
from megatron_fp16rl.utils.files import write_text

PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "megatron-fp16rl")
_TIMEOUT_S = 900
_CLOCK_S = 2.0
_LOCKABLE_BYTES = 1 << 30
_MESSAGE_BYTES, _REPEATS = 4 << 20, 10
_SLOW = 0.4  # of the usual speed

Facts = dict[str, Any]  # of a node: its name, clock, versions, and what is wrong with it alone
Pair = dict[str, Any]  # nodes: two names, gb_per_s: each way
Problem = dict[str, str | None]  # node, None: none is to blame, and the run goes on; what


def main() -> int:
    """Examines the nodes of this job; prints the report; returns 1 if a node is not fit."""
    # MPI waits for a missing node without a limit, and blocks Python's threads.
    faulthandler.dump_traceback_later(_TIMEOUT_S, exit=True)
    print(f"{socket.gethostname()} waits for the other nodes", file=sys.stderr, flush=True)
    folder = Path(sys.argv[1])
    slurm = load(folder / RECIPE_FILE).slurm
    try:
        from_mpi(slurm.interface if slurm else None)
    except BootstrapError as error:
        print(f"problem: {error}", file=sys.stderr)
        return 1
    world = mpi_world()
    marker = folder / f".preflight-{world.bcast(secrets.token_hex(8))}"
    if world.rank == 0:
        write_text(marker, "")
    world.Barrier()
    facts = world.allgather(examine(marker))
    world.Barrier()
    if world.rank == 0:
        marker.unlink()
    pairs = _measure([node["node"] for node in facts])
    problems = compare(facts) + compare_pairs(pairs)
    if world.rank == 0:
        _print(facts, pairs, problems)
    return 1 if any(problem["node"] for problem in problems) else 0


def examine(marker: Path) -> Facts:
    """What this node is like. marker: what rank 0 has written into the run directory."""
    clock, local = time.time(), int(os.environ["LOCAL_RANK"])
    name = socket.gethostname() + (f":{local}" if local else "")
    wrong = []
    if not marker.exists():
        wrong.append("does not see what another node writes into the run directory")
    try:
        write_text(own := marker.with_name(f"{marker.name}-{name}"), "")
        own.unlink()
    except OSError as error:
        wrong.append(f"cannot write into the run directory: {error.strerror}")
    if (lockable := _lockable()) is not None and lockable < _LOCKABLE_BYTES:
        wrong.append(
            f"its InfiniBand may lock {lockable >> 10} KiB of memory only, and NCCL fails; "
            "`ulimit -l unlimited` where you submit, since Slurm hands the limit on"
        )
    for device in [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]:
        if error := _product_error(device):
            wrong.append(f"device {device} multiplies fp16 matrices wrongly, by {error:g}")
    return {"node": name, "clock": clock, "versions": _versions(), "wrong": wrong}


def compare(facts: Sequence[Facts]) -> list[Problem]:
    """What is wrong with nodes, alone and beside the others."""
    clock = statistics.median(node["clock"] for node in facts)
    names = {name: None for node in facts for name in node["versions"]}
    usual = {n: statistics.mode(node["versions"].get(n) for node in facts) for n in names}
    problems: list[Problem] = []
    for node in facts:
        texts = list(node["wrong"])
        for name in usual:
            if (own := node["versions"].get(name)) != usual[name]:
                texts.append(f"{name} is {own or 'not there'}, elsewhere {usual[name] or 'not there'}")
        if abs(node["clock"] - clock) > _CLOCK_S:
            texts.append(f"its clock is off by {node['clock'] - clock:+.1f} s")
        problems += [{"node": node["node"], "what": text} for text in texts]
    return problems


def compare_pairs(pairs: Sequence[Pair]) -> list[Problem]:
    """Slow connections in the ring. A node is to blame if both of its neighbours are slow with it."""
    if len(pairs) < 3:
        return []  # nothing to compare with
    usual = sorted(pair["gb_per_s"] for pair in pairs)[len(pairs) * 3 // 4]
    slow = [pair for pair in pairs if pair["gb_per_s"] < _SLOW * usual]
    ends = [node for pair in slow for node in pair["nodes"]]
    blamed = {node for node in ends if ends.count(node) == 2}
    what = f"is slow with both its neighbours (usual {usual:.2f} GB/s)"
    problems: list[Problem] = [{"node": node, "what": what} for node in sorted(blamed)]
    for pair in slow:
        if not blamed & set(pair["nodes"]):
            what = f"{' and '.join(pair['nodes'])} exchange {pair['gb_per_s']:.2f} GB/s, usual {usual:.2f}"
            problems.append({"node": None, "what": what})
    return problems


def _measure(nodes: Sequence[str]) -> list[Pair]:
    """What neighbours in the ring of nodes exchange, one pair at a time. Collective."""
    current = platform.current()
    if current.NAME == "cuda":
        torch.cuda.set_device(current.device())
    tcp_store.init_process_group(current.COLLECTIVES)
    rank, count = dist.get_rank(), len(nodes)
    message = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=current.device())
    ring = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    seconds = torch.zeros(len(ring), device=current.device())
    for number, (first, second) in enumerate(ring):
        if rank == first:
            seconds[number] = min(_exchange(message, second) for _ in range(_REPEATS))
        elif rank == second:
            for _ in range(_REPEATS):
                _exchange(message, first)
        dist.barrier()
    dist.all_reduce(seconds)
    dist.destroy_process_group()
    return [
        {"nodes": [nodes[a], nodes[b]], "gb_per_s": _MESSAGE_BYTES / time_s / 1e9}
        for (a, b), time_s in zip(ring, seconds.tolist(), strict=True)
    ]


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


def _versions() -> dict[str, str]:
    """Of all that must be the same on all nodes: packages, devices, driver, and NCCL's settings."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
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
    nccl = {n: v for n, v in os.environ.items() if n.startswith("NCCL_") and n != "NCCL_SOCKET_IFNAME"}
    return {**versions, **nccl}


def _lockable() -> int | None:
    """How much memory may be locked, bytes; None where there is no limit, or no InfiniBand that needs it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = any(Path("/sys/class/infiniband").glob("*"))
    return limit if adapters and limit != resource.RLIM_INFINITY else None


def _product_error(device: str) -> float:
    """The error of an fp16 product of small whole numbers: zero on a sound device."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (256, 64), generator=draw).float() for _ in range(2))
    exact = a @ b.T  # at most 64 * 16: fp16 holds every sum
    product = (a.half().to(device) @ b.half().to(device).T).float().cpu()
    return (product - exact).abs().max().item()


def _print(facts: Sequence[Facts], pairs: Sequence[Pair], problems: Sequence[Problem]) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"nodes": facts, "pairs": pairs, "problems": problems}))
        return
    for node in facts:
        print(f"{node['node']}: {node['versions'].get('devices', 'no GPU')}")
    for pair in pairs:
        print(f"{' and '.join(pair['nodes'])} exchange {pair['gb_per_s']:.2f} GB/s each way")
    for problem in problems:
        print(f"problem: {problem['node'] or 'a connection:'} {problem['what']}")
    if bad := sorted({name for problem in problems if (name := problem["node"])}):
        print(f"remedy: fix, or submit again with --exclude={','.join(bad)} (slurm.options.exclude)")
    elif not problems:
        print("preflight: all well")


if __name__ == "__main__":
    sys.exit(main())
