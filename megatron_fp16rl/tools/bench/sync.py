"""Publishing weights to real servers, against a bare broadcast of as many bytes in the same run."""

import contextlib
import datetime
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl import platform
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.utils.processes import die_with_parent, free_port, spawn, stop

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    import torch.distributed as dist

    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.rollout.client import Client
    from megatron_fp16rl.rollout.weight_sync.base import Transport

TRANSPORTS = ("distributed", "disk")
_GROUP = "fp16rl-bare-broadcast"
_PIECE = 1 << 30  # bytes that a bare broadcast sends at once
_TIMEOUT_S = 1800.0

Say = Callable[[str], None]
Send = Callable[[Iterator, str], int]  # a stream of tensors and their version -> bytes


@dataclass(frozen=True)
class Ways:
    """What is tried: each transport, and each bucket size where there are buckets."""

    transports: Sequence[str] = TRANSPORTS
    buckets_mib: Sequence[int] = (64, 1024)
    repeats: int = 5

    def all(self) -> list[tuple[str, int | None]]:
        """Pairs of transport and bucket size."""
        return [
            (transport, bucket)
            for transport in self.transports
            for bucket in (self.buckets_mib if transport == "distributed" else (None,))
        ]


def measure(recipe: Recipe, ways: Ways, work: Path, say: Say) -> dict[str, object] | None:
    """Times every way; the result is with rank 0. Collective over the learner's ranks.

    Rank 0 starts the recipe's servers, and as many processes that receive the bare broadcasts.
    work: a folder for logs, and for weights on their way over the disk. Raises RecipeError,
    ServerDied, ServerError.
    """
    if recipe.rollout.replay is not None:
        raise RecipeError("rollout.replay: there are no servers to publish to; set it to null")
    from megatron_fp16rl.parallel import initialize

    os.environ.update(nccl.agreed(recipe.rollout))
    world = initialize(recipe.learner, recipe.trainer.seed)
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.rollout.weight_sync.group import abort

    like = model_folder(recipe.model)
    learner = Learner.from_recipe(recipe, like, world)
    size = sum(tensor.nbytes for _, tensor in learner.export())
    if not world.is_rank0:
        for _ in range(len(ways.all()) * (1 + ways.repeats)):
            _publish(learner, lambda tensors, _: sum(1 for _ in tensors), "")
        return None
    say("servers start")
    with _receivers(recipe, work / "logs") as group, _servers(recipe, like, work) as clients:
        connected = _connect(recipe, ways, like, work / "scratch")
        bare_group = group()
        bare = _bare_broadcast(size, bare_group)
        versions = map(str, itertools.count())
        rows = []
        for transport, bucket in ways.all():
            say(transport + (f", buckets of {bucket} MiB" if bucket else ""))
            way, pairs = connected[transport], []
            if bucket is not None:
                way.bucket_bytes = (bucket << 20) // 2  # as it is made from sync.bucket_mib
            send = functools.partial(way.send, clients=clients)
            for _ in range(1 + ways.repeats):  # the first is for warming up
                pairs.append((bare(), *_publish(learner, send, version := next(versions))))
            _check_version(clients, version)
            rows.append({"transport": transport, "bucket_mib": bucket, **row(pairs[1:])})
        for way in connected.values():  # while the others are there: NCCL would wait for them
            way.close()
        abort(bare_group)
    return {"platform": platform.current().describe(), "servers": len(clients), "rows": rows}


def row(measured: Sequence[tuple[float, float, int]]) -> dict[str, object]:
    """A way's row, of (seconds of a bare broadcast, seconds of a sync, its bytes), turn by turn."""
    seconds = [sync for _, sync, _ in measured]
    took, size = statistics.median(seconds), measured[0][2]
    return {
        "bytes": size,
        "seconds": took,
        "seconds_low": min(seconds),
        "seconds_high": max(seconds),
        "gb_per_s": size / took / 1e9,
        "fraction_of_broadcast": statistics.median(bare / sync for bare, sync, _ in measured),
        "broadcast_seconds": statistics.median(bare for bare, _, _ in measured),
    }


def _publish(learner: "Learner", send: Send, version: str) -> tuple[float, int]:
    """Seconds of a sync, and its bytes. Collective."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    sent = send(learner.export(), version)
    return time.perf_counter() - began, sent


def _connect(recipe: Recipe, ways: Ways, like: Path, scratch: Path) -> "dict[str, Transport]":
    """The transports by name. Servers join a group for `distributed` at its first use."""
    from megatron_fp16rl.rollout.weight_sync import connect

    rollout = recipe.rollout
    return {
        name: connect(
            recipe.sync.model_copy(update={"transport": name}),
            rollout.tensor_parallel,
            rollout.host,
            like,
            scratch,
            recipe.precision.served,
        )
        for name in ways.transports
    }


def _check_version(clients: "list[Client]", version: str) -> None:
    """Raises RuntimeError unless every server samples from the weights that were sent last."""
    from megatron_fp16rl.rollout.client import Sampling

    for client in clients:
        (answer,) = client.generate([[2, 3]], Sampling(1))
        if answer.version != version:
            raise RuntimeError(f"{client.url} has weights {answer.version!r}, not {version!r}")


@contextlib.contextmanager
def _servers(recipe: Recipe, like: Path, work: Path) -> "Iterator[list[Client]]":
    from megatron_fp16rl.rollout.client import Client
    from megatron_fp16rl.rollout.server import ServerConfig, launch_servers

    config, first_device = ServerConfig.of(recipe), recipe.learner.ranks
    count = recipe.rollout.servers
    with launch_servers(config, like, work / "logs", count, first_device) as endpoints:
        yield [Client(endpoint, recipe.rollout.request_timeout_s) for endpoint in endpoints]


@contextlib.contextmanager
def _receivers(recipe: Recipe, logs: Path) -> Iterator[Callable[[], "dist.ProcessGroup"]]:
    """Processes that receive what this one broadcasts, one for each rank of a server, on its device.

    Gives what joins them, which waits until they have started.
    """
    here, rollout = platform.current(), recipe.rollout
    ranks = rollout.servers * rollout.tensor_parallel
    meeting = {
        "init_method": f"tcp://{rollout.host}:{free_port(rollout.host)}",
        "world_size": 1 + ranks,
        "backend": here.COLLECTIVES,
    }
    children = []
    try:
        for rank in range(1, 1 + ranks):
            devices = here.server_environment(recipe.learner.ranks + rank - 1, 1)
            options = json.dumps({**meeting, "rank": rank})
            command = [sys.executable, "-m", "megatron_fp16rl.tools.bench.sync", options]
            log = logs / f"receiver_{rank}.log"
            children.append(spawn(command, log, {**devices, "LOCAL_RANK": "0"}))
        yield lambda: _join(rank=0, **meeting)
    finally:
        stop(children, patience_s=0)


def _join(**meeting: object) -> "dist.ProcessGroup":
    platform.current().prepare_sglang()
    from sglang.srt.utils import init_custom_process_group

    wait = datetime.timedelta(seconds=_TIMEOUT_S)
    return init_custom_process_group(group_name=_GROUP, timeout=wait, **meeting)


def _bare_broadcast(size: int, group: "dist.ProcessGroup") -> Callable[[], float]:
    """A function that broadcasts `size` bytes and returns the seconds until all have them."""
    import torch
    import torch.distributed as dist

    device = platform.current().device()
    sizes = torch.tensor([size], device=device)
    dist.broadcast(sizes, group=group, group_src=0)
    buffer = torch.zeros(min(size, _PIECE), dtype=torch.uint8, device=device)

    def broadcast() -> float:
        dist.barrier(group=group)
        began = time.perf_counter()
        for start in range(0, size, _PIECE):
            dist.broadcast(buffer[: min(_PIECE, size - start)], group=group, group_src=0)
        dist.barrier(group=group)
        return time.perf_counter() - began

    return broadcast


def _receive() -> None:
    """Receives broadcasts until killed: the other end of `_bare_broadcast`."""
    die_with_parent()
    import torch
    import torch.distributed as dist

    group = _join(**json.loads(sys.argv[1]))
    device = platform.current().device()
    sizes = torch.zeros(1, dtype=torch.int64, device=device)
    dist.broadcast(sizes, group=group, group_src=0)
    size = int(sizes)
    buffer = torch.zeros(min(size, _PIECE), dtype=torch.uint8, device=device)
    while True:
        dist.barrier(group=group)
        for start in range(0, size, _PIECE):
            dist.broadcast(buffer[: min(_PIECE, size - start)], group=group, group_src=0)
        dist.barrier(group=group)


if __name__ == "__main__":
    _receive()
