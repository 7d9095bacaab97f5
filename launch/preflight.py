"""Before any model loads: are these nodes fit for the run? `srun ... python -m launch.preflight RUN_DIR`

One process a node; they find each other by MPI. A node that is unlike the others, or slow, is named, with the
--exclude that keeps the next job off it.
"""

import contextlib
import faulthandler
import importlib.metadata
import json
import os
import platform as python_platform
import re
import resource
import secrets
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from launch.bootstrap import BootstrapError, from_mpi, mpi_world
from launch.outcome import RECIPE_FILE
from launch.pairs import Pair, Problem, exchange_in_pairs, judge_pairs
from megatron_fp16rl import platform
from megatron_fp16rl.recipe import load
from megatron_fp16rl.utils import tcp_store
from megatron_fp16rl.utils.files import write_text

PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "megatron-fp16rl")
_TIMEOUT_S = 900
_CLOCK_S = 2.0
_MEMORY_GIB, _DISK_GIB = 2.0, 1.0
_LOCKABLE_BYTES = 1 << 30

Facts = dict[str, Any]  # of a node


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
    token = world.bcast(secrets.token_hex(8) if world.rank == 0 else None)
    marker = folder / f".preflight-{token}"
    if world.rank == 0:
        write_text(marker, token)
    world.Barrier()
    facts = world.allgather(examine(folder, token))
    world.Barrier()
    if world.rank == 0:
        marker.unlink()
    pairs = _measure_pairs([node["node"] for node in facts])
    problems = judge(facts) + judge_pairs(pairs)
    if world.rank == 0:
        _print(facts, pairs, problems)
    return 1 if any(problem.node for problem in problems) else 0


def examine(folder: Path, token: str) -> Facts:
    """What this node is like. folder: the run directory, where rank 0 has written `token`."""
    clock = time.time()
    local = int(os.environ["LOCAL_RANK"])
    marker = folder / f".preflight-{token}"
    return {
        "node": socket.gethostname() + (f":{local}" if local else ""),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "clock": clock,
        "versions": {"python": python_platform.python_version(), **_versions()},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "memory_gib": psutil.virtual_memory().available / 2**30,
        "disk_gib": shutil.disk_usage(folder).free / 2**30,
        "shared": marker.exists() and marker.read_text() == token,
        "writable": _is_writable(folder),
        "gemm": _gemm_errors(),
        "lockable_bytes": _lockable(),
    }


def judge(facts: Sequence[Facts]) -> list[Problem]:
    """What is wrong with nodes, compared with the others and with the limits."""
    clock = statistics.median(node["clock"] for node in facts)
    devices = statistics.mode(json.dumps(node["devices"]) for node in facts)
    names = {name: None for node in facts for name in node["versions"]}
    versions = {n: statistics.mode(node["versions"].get(n) for node in facts) for n in names}
    problems = []
    for node in facts:
        texts = []
        for name, usual in versions.items():
            if (own := node["versions"].get(name)) != usual:
                texts.append(f"{name} is {own or 'not there'}, elsewhere {usual or 'not there'}")
        if json.dumps(node["devices"]) != devices:
            texts.append(f"has devices {node['devices'] or 'none'}, unlike the others")
        if abs(node["clock"] - clock) > _CLOCK_S:
            texts.append(f"its clock is off by {node['clock'] - clock:+.1f} s")
        if not node["shared"]:
            texts.append("does not see what another node writes into the run directory")
        if not node["writable"]:
            texts.append("cannot write into the run directory")
        if node["memory_gib"] < _MEMORY_GIB:
            texts.append(f"only {node['memory_gib']:.1f} GiB of memory are free")
        if node["disk_gib"] < _DISK_GIB:
            texts.append(f"only {node['disk_gib']:.1f} GiB are free where the run directory is")
        if node["lockable_bytes"] is not None and node["lockable_bytes"] < _LOCKABLE_BYTES:
            texts.append(
                f"its InfiniBand may lock {node['lockable_bytes'] >> 10} KiB of memory only, and NCCL "
                "fails; `ulimit -l unlimited` where you submit, since Slurm hands the limit on"
            )
        for device, error in node["gemm"].items():
            if error != 0:
                texts.append(f"device {device} multiplies fp16 matrices wrongly, by {error:g}")
        problems += [Problem(node["node"], text) for text in texts]
    return problems


def _measure_pairs(nodes: Sequence[str]) -> list[Pair]:
    """What each pair of nodes exchanges. Collective."""
    current = platform.current()
    if current.NAME == "cuda":
        torch.cuda.set_device(current.device())
    tcp_store.init_process_group(current.COLLECTIVES)
    pairs = exchange_in_pairs(nodes, current.device())
    dist.destroy_process_group()
    return pairs


def _versions() -> dict[str, str]:
    """Of packages and of what a GPU's kernels come from; and NCCL's settings, which all ranks must share."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        # "Kernel Module  580.65.06", or "Open Kernel Module for x86_64  580.65.06"
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
        versions["driver"] = driver[1] if driver else "unknown"
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name, value in os.environ.items():
        # Interfaces may have other names on other nodes.
        if name.startswith("NCCL_") and name != "NCCL_SOCKET_IFNAME":
            versions[name] = value
    return versions


def _lockable() -> int | None:
    """How much memory may be locked, bytes; None where there is no limit, or no InfiniBand that needs it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = Path("/sys/class/infiniband")
    has_adapters = adapters.is_dir() and any(adapters.iterdir())
    return limit if has_adapters and limit != resource.RLIM_INFINITY else None


def _gemm_errors() -> dict[str, float]:
    """By device, the error of an fp16 product of small whole numbers: zero on a sound device."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (256, 64), generator=draw).float() for _ in range(2))
    exact = a @ b.T  # at most 64 * 16: fp16 holds every sum
    errors = {}
    for device in devices:
        product = (a.half().to(device) @ b.half().to(device).T).float().cpu()
        errors[device] = (product - exact).abs().max().item()
    return errors


def _is_writable(folder: Path) -> bool:
    file = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        write_text(file, "")
        file.unlink()
    except OSError:
        return False
    return True


def _print(facts: Sequence[Facts], pairs: Sequence[Pair], problems: Sequence[Problem]) -> None:
    if "--json" in sys.argv:
        report = {"nodes": facts, "pairs": pairs, "problems": [asdict(p) for p in problems]}
        print(json.dumps(report))
        return
    for node in facts:
        devices = f"{len(node['devices'])} GPUs" if node["devices"] else "no GPU"
        print(
            f"{node['node']}: {devices}, {node['memory_gib']:.0f} GiB free, torch {torch.__version__}"
        )
    if pairs:
        speeds = [pair["gb_per_s"] for pair in pairs]
        print(
            f"{len(pairs)} pairs of nodes exchange {min(speeds):.2f} to {max(speeds):.2f} GB/s each way"
        )
    for problem in problems:
        print(
            f"problem: {problem.node} {problem.what}" if problem.node else f"slow: {problem.what}"
        )
    if bad := sorted({problem.node for problem in problems if problem.node}):
        print(
            f"remedy: fix, or submit again with --exclude={','.join(bad)} (slurm.options.exclude)"
        )
    elif not problems:
        print("preflight: all well")


if __name__ == "__main__":
    sys.exit(main())
