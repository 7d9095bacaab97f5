"""Before any model loads: are these nodes fit for the run? `srun ... python -m launch.preflight RUN_DIR`

One process a node, which find each other by MPI. A node that is unlike the others, or slow, is named,
with the --exclude that keeps the next job off it.
"""

import faulthandler
import importlib.metadata
import json
import os
import platform
import re
import resource
import secrets
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_fp16rl.utils.files import write_text

PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "megatron-fp16rl")
_PATIENCE_S = 900
_CLOCK_S = 2.0
_SLOW = 0.5  # of the median
_MEMORY_GIB, _DISK_GIB = 2.0, 1.0
_LOCKABLE_BYTES = 1 << 30
_OWN_NCCL = ("NCCL_SOCKET_IFNAME",)  # interfaces may have other names on other nodes
_MESSAGE_BYTES = 4 << 20
_REPEATS = 3
_SECOND_LOOKS = 2


@dataclass(frozen=True)
class Problem:
    """Something that would make the run fail, or be slow, or be wrong."""

    node: str | None  # None: a slow connection, for which no node is to blame; the run goes on
    what: str


def main() -> int:
    """Examines the nodes of this job; prints what it found; returns 1 if a node is not fit."""
    from launch.bootstrap import BootstrapError, from_mpi, mpi_world
    from launch.outcome import RECIPE_FILE
    from megatron_fp16rl.recipe import load

    # MPI waits for whoever is missing without a limit, and lets no thread of Python's say so.
    faulthandler.dump_traceback_later(_PATIENCE_S, exit=True)
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
    if world.rank == 0:
        write_text(folder / f".preflight-{token}", token)
    world.Barrier()
    facts = world.allgather(examine(folder, token))
    world.Barrier()
    if world.rank == 0:
        (folder / f".preflight-{token}").unlink()
    pairs = measure_pairs([fact["node"] for fact in facts])
    problems = judge(facts) + judge_pairs(pairs)
    if world.rank == 0:
        _print(facts, pairs, problems)
    return 1 if any(problem.node for problem in problems) else 0


def examine(folder: Path, token: str) -> dict[str, object]:
    """What this node is like. folder: the run directory, where rank 0 has left `token`."""
    clock = time.time()
    return {
        "node": _name(),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "clock": clock,
        "versions": {"python": platform.python_version(), **_versions(), **_libraries(), **_nccl()},
        "devices": _devices(),
        "memory_gib": psutil.virtual_memory().available / 2**30,
        "disk_gib": shutil.disk_usage(folder).free / 2**30,
        "shared": _sees(folder, token),
        "writable": _writes(folder),
        "gemm": _gemm_errors(),
        "lockable_bytes": _lockable(),
    }


def judge(facts: Sequence[dict]) -> list[Problem]:
    """What is wrong with the nodes, seen side by side."""
    problems = []

    def complain(node: str, what: str) -> None:
        problems.append(Problem(node, what))

    clock = statistics.median(fact["clock"] for fact in facts)
    devices = statistics.mode(json.dumps(fact["devices"]) for fact in facts)
    versions = {
        package: statistics.mode(fact["versions"].get(package) for fact in facts)
        for package in {name: None for fact in facts for name in fact["versions"]}
    }
    for fact in facts:
        node = fact["node"]
        for package, wanted in versions.items():
            if fact["versions"].get(package) != wanted:
                found = fact["versions"].get(package) or "not there"
                complain(node, f"{package} is {found}, elsewhere {wanted or 'not there'}")
        if json.dumps(fact["devices"]) != devices:
            complain(node, f"has devices {fact['devices'] or 'none'}, unlike the others")
        if abs(fact["clock"] - clock) > _CLOCK_S:
            complain(node, f"its clock is off by {fact['clock'] - clock:+.1f} s")
        if not fact["shared"]:
            complain(node, "does not see what another node writes into the run directory")
        if not fact["writable"]:
            complain(node, "cannot write into the run directory")
        if fact["memory_gib"] < _MEMORY_GIB:
            complain(node, f"only {fact['memory_gib']:.1f} GiB of memory are free")
        if fact["disk_gib"] < _DISK_GIB:
            complain(node, f"only {fact['disk_gib']:.1f} GiB are free where the run directory is")
        if fact["lockable_bytes"] is not None and fact["lockable_bytes"] < _LOCKABLE_BYTES:
            complain(
                node,
                f"its InfiniBand may lock {fact['lockable_bytes'] >> 10} KiB of memory only, and NCCL "
                "fails; `ulimit -l unlimited` where you submit, since Slurm hands the limit on",
            )
        for device, error in fact["gemm"].items():
            if error != 0:
                complain(node, f"device {device} multiplies fp16 matrices wrongly, by {error:g}")
    return problems


def judge_pairs(pairs: Sequence[dict]) -> list[Problem]:
    """Slow connections. A node is to blame if it is slow with most others, and they are not."""
    usual, slow = slow_pairs(pairs)
    nodes = {node for pair in pairs for node in pair["nodes"]}
    counts = {node: sum(node in pair["nodes"] for pair in slow) for node in nodes}
    blamed = {node for node, count in counts.items() if count > (len(nodes) - 1) / 2}
    problems = [
        Problem(
            node, f"is slow with {counts[node]} of {len(nodes) - 1} nodes (usual {usual:.2f} GB/s)"
        )
        for node in sorted(blamed)
    ]
    for pair in slow:
        if not blamed & set(pair["nodes"]):
            first, second = pair["nodes"]
            problems.append(
                Problem(
                    None,
                    f"{first} and {second} exchange {pair['gb_per_s']:.2f} GB/s, usual {usual:.2f}",
                )
            )
    return problems


def slow_pairs(pairs: Sequence[dict]) -> tuple[float, list[dict]]:
    """The usual GB/s, and the pairs that exchange far less. Of fewer than three, none is slow."""
    usual = statistics.median(pair["gb_per_s"] for pair in pairs) if pairs else 0.0
    return usual, [p for p in pairs if len(pairs) > 2 and p["gb_per_s"] < _SLOW * usual]


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `count` players once, in rounds in which each plays once (the circle method)."""
    players = list(range(count + count % 2))  # an odd one sits out against a ghost
    for _ in range(len(players) - 1):
        half = len(players) // 2
        table = zip(players[:half], reversed(players[half:]), strict=True)
        yield [tuple(sorted(pair)) for pair in table if max(pair) < count]
        players = [players[0], players[-1], *players[1:-1]]


def measure_pairs(nodes: Sequence[str]) -> list[dict[str, object]]:
    """What each pair of nodes exchanges; see `exchange_in_pairs`. Collective: one process a node."""
    import torch
    import torch.distributed as dist

    from megatron_fp16rl import platform as platforms
    from megatron_fp16rl.utils import meeting

    here = platforms.current()
    if here.NAME == "cuda":
        torch.cuda.set_device(here.device())
    meeting.join(here.COLLECTIVES)
    pairs = exchange_in_pairs(nodes, here.device())
    dist.destroy_process_group()
    return pairs


def exchange_in_pairs(names: Sequence[str], device: object) -> list[dict[str, object]]:
    """What each pair of ranks exchanges at once both ways: GB/s each way, and latency. Collective.

    names: of all ranks. Each pair has its turn while other pairs have theirs; those that seem slow are
    asked again alone, since what a network or a machine does besides is not their fault.
    """
    found = _take_turns(names, device, rounds(len(names)))
    for _ in range(_SECOND_LOOKS):
        _, slow = slow_pairs(found.values())
        turns = [[pair] for pair, seen in found.items() if seen in slow]
        for pair, seen in _take_turns(names, device, turns).items():
            found[pair] = max(found[pair], seen, key=lambda p: p["gb_per_s"])
    return list(found.values())


def _take_turns(
    names: Sequence[str], device: object, turns: Iterable[Sequence[tuple[int, int]]]
) -> dict[tuple[int, int], dict[str, object]]:
    """By pair, what it exchanges; the pairs of one turn at the same time. The same on every rank."""
    import torch
    import torch.distributed as dist

    rank, mine = dist.get_rank(), {}
    large = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=device)
    for pairs in turns:
        for pair in pairs:
            if rank in pair:
                other = sum(pair) - rank
                _exchange(large[:1], other)  # connects them
                latency = min(_exchange(large[:1], other) for _ in range(_REPEATS))
                seconds = min(_exchange(large, other) for _ in range(_REPEATS))
                if rank == pair[0]:
                    mine[pair] = {
                        "nodes": [names[pair[0]], names[pair[1]]],
                        "gb_per_s": _MESSAGE_BYTES / seconds / 1e9,
                        "latency_us": latency * 1e6,
                    }
        dist.barrier()
    everything: list[dict] = [{} for _ in names]
    dist.all_gather_object(everything, mine)
    return {pair: seen for found in everything for pair, seen in found.items()}


def _exchange(message: object, other: int) -> float:
    """Seconds to send a message to another rank while receiving its."""
    import torch
    import torch.distributed as dist

    received = torch.empty_like(message)
    began = time.perf_counter()
    operations = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    if message.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _name() -> str:
    local = int(os.environ["LOCAL_RANK"])
    return socket.gethostname() + (f":{local}" if local else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _libraries() -> dict[str, str]:
    """What a GPU's kernels come from, beside Python packages: driver, cuDNN, NCCL; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    # "Kernel Module  580.65.06", or "Open Kernel Module for x86_64  580.65.06"
    said = Path("/proc/driver/nvidia/version").read_text()
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", said)
    return {
        "driver": driver[1] if driver else "unknown",
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _nccl() -> dict[str, str]:
    """NCCL's settings, which all ranks must share."""
    return {n: v for n, v in os.environ.items() if n.startswith("NCCL_") and n not in _OWN_NCCL}


def _lockable() -> int | None:
    """How much memory may be locked, bytes; None where there is no limit, or no InfiniBand that needs it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = Path("/sys/class/infiniband")
    needed = adapters.is_dir() and any(adapters.iterdir())
    return limit if needed and limit != resource.RLIM_INFINITY else None


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _gemm_errors() -> dict[str, float]:
    """By device, the error of an fp16 product of small whole numbers, which has none if all is well."""
    import torch

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (256, 64), generator=draw).float() for _ in range(2))
    exact = a @ b.T  # at most 64 * 16: every sum is a whole number that fp16 holds
    found = {}
    for device in devices:
        product = (a.half().to(device) @ b.half().to(device).T).float().cpu()
        found[device] = (product - exact).abs().max().item()
    return found


def _sees(folder: Path, token: str) -> bool:
    file = folder / f".preflight-{token}"
    return file.exists() and file.read_text() == token


def _writes(folder: Path) -> bool:
    file = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        write_text(file, "")
        file.unlink()
    except OSError:
        return False
    return True


def _print(facts: Sequence[dict], pairs: Sequence[dict], problems: Sequence[Problem]) -> None:
    if "--json" in sys.argv:
        found = {"nodes": facts, "pairs": pairs, "problems": [asdict(p) for p in problems]}
        print(json.dumps(found))
        return
    for fact in facts:
        devices = f"{len(fact['devices'])} GPUs" if fact["devices"] else "no GPU"
        print(
            f"{fact['node']}: {devices}, {fact['memory_gib']:.0f} GiB free, torch {fact['versions'].get('torch')}"
        )
    if pairs:
        speeds = sorted(pair["gb_per_s"] for pair in pairs)
        print(
            f"{len(pairs)} pairs of nodes exchange {speeds[0]:.2f} to {speeds[-1]:.2f} GB/s each way"
        )
    for problem in problems:
        print(
            f"problem: {problem.node} {problem.what}" if problem.node else f"slow: {problem.what}"
        )
    bad = sorted({problem.node for problem in problems if problem.node})
    if bad:
        print(f"remedy: fix, or submit again with --exclude={','.join(bad)} (slurm.exclude)")
    elif not problems:
        print("preflight: all well")


if __name__ == "__main__":
    sys.exit(main())
