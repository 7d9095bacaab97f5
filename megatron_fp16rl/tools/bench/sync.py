"""Publishing weights to real servers, against a bare broadcast of as many bytes in the same run."""

import contextlib
import datetime
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.parallel import World, initialize
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.rollout.weight_sync import connect
from megatron_fp16rl.rollout.weight_sync.base import Transport, Weights
from megatron_fp16rl.rollout.weight_sync.group import abort
from megatron_fp16rl.tools.bench.common import Result, Say, spread
from megatron_fp16rl.utils.processes import die_with_parent, free_port, spawn, stop

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

_GROUP = "fp16rl-bare-broadcast"
_CHUNK = 1 << 30  # bytes of one bare broadcast
_TIMEOUT_S = 1800.0

Send = Callable[[Weights], int]  # -> bytes sent to each server


def measure(recipe: Recipe, buckets_mib: Sequence[int], repeats: int, say: Say) -> Result | None:
    """Times `sliced` and `distributed` with each bucket size, and `disk`; rank 0 has the result. Collective.

    Rank 0 starts the recipe's servers, and one receiver of the bare broadcasts per server rank.
    Raises ServerDied, ServerError.
    """
    os.environ.update(nccl.agreed(recipe.rollout))
    world = initialize(recipe.learner, recipe.trainer.seed)
    # The groups with the servers must not look for torchrun's store.
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    from megatron_fp16rl.learner.learner import Learner

    model = model_folder(recipe.model)
    learner = Learner.from_recipe(recipe, model, world)
    ways: list[tuple[str, int | None]] = [
        *((transport, bucket) for transport in ("sliced", "distributed") for bucket in buckets_mib),
        ("disk", None),
    ]
    sizes = [tensor.nbytes for _, tensor in learner.export()]
    rows, versions = [], map(str, itertools.count())
    with contextlib.ExitStack() as stack:
        work, clients = Path(stack.enter_context(tempfile.TemporaryDirectory())), []
        bare_broadcast: Callable[[], float] = float  # rank 0 times it
        if world.is_rank0:
            say("servers start")
            group = stack.enter_context(_receivers(recipe, work / "logs"))()
            running = stack.enter_context(
                launch_servers(
                    *(ServerConfig.of(recipe), model, work / "logs"),
                    *(recipe.rollout.servers, recipe.learner.ranks),
                )
            )
            clients = [
                Client(server.endpoint, recipe.rollout.request_timeout_s) for server in running
            ]
            bare_broadcast = _bare_broadcast(sum(sizes), group)
        for transport, bucket in ways:
            say(transport + (f", buckets of {bucket} MiB" if bucket else ""))
            sender = _connect(recipe, transport, bucket, model, work / "scratch", world)
            measured = []
            for _ in range(1 + repeats):  # the first warms up, and joins the servers' group
                version = next(versions)
                send = functools.partial(sender.send, version=version, servers=clients)
                measured.append((bare_broadcast(), *_publish(learner, send)))
            _check_version(clients, version)
            case = {"transport": transport, "bucket_mib": bucket, "tensors": len(sizes)}
            rows.append(case | row(measured[1:]))
            sender.close()  # while the servers still run: NCCL waits for them
        if world.is_rank0:
            abort(group)
    if not world.is_rank0:
        return None
    return {"platform": platform.current().describe(), "servers": len(clients), "rows": rows}


def row(measured: Sequence[tuple[float, float, int]]) -> Result:
    """One row, from (seconds of a bare broadcast, seconds of a sync, its bytes), turn by turn."""
    size, seconds = measured[0][2], [sync for _, sync, _ in measured]
    return {
        "bytes": size,
        **spread("seconds", seconds),
        "gb_per_s": size / statistics.median(seconds) / 1e9,
        "fraction_of_broadcast": statistics.median(bare / sync for bare, sync, _ in measured),
        "broadcast_seconds": statistics.median(bare for bare, _, _ in measured),
    }


def _publish(learner: "Learner", send: Send) -> tuple[float, int]:
    """Seconds of a sync, and its bytes. Collective."""
    dist.barrier()
    began = time.perf_counter()
    sent = send(learner.exported)
    return time.perf_counter() - began, sent


def _connect(
    recipe: Recipe, transport: str, bucket: int | None, model: Path, scratch: Path, world: World
) -> Transport:
    settings = {"transport": transport, "bucket_mib": bucket or recipe.sync.bucket_mib}
    return connect(
        recipe.sync.model_copy(update=settings),
        recipe.rollout.tensor_parallel,
        recipe.rollout.host,
        model,
        scratch,
        recipe.precision.served,
        world,
    )


def _check_version(clients: "list[Client]", version: str) -> None:
    """Raises RuntimeError unless every server samples from the weights that were sent last."""
    for client in clients:
        (answer,) = client.generate([[2, 3]], Sampling(1))
        if answer.version != version:
            raise RuntimeError(f"{client.url} has weights {answer.version!r}, not {version!r}")


@contextlib.contextmanager
def _receivers(recipe: Recipe, logs: Path) -> Iterator[Callable[[], "dist.ProcessGroup"]]:
    """Starts one process per server rank, on its device, that receives the bare broadcasts.

    Yields a function that joins their group; it waits until they have started.
    """
    device, rollout = platform.current(), recipe.rollout
    ranks = rollout.servers * rollout.tensor_parallel
    rendezvous = {
        "init_method": f"tcp://{rollout.host}:{free_port(rollout.host)}",
        "world_size": 1 + ranks,
        "backend": device.COLLECTIVES,
    }
    children = []
    try:
        for rank in range(1, 1 + ranks):
            devices = device.server_environment(recipe.learner.ranks + rank - 1, 1)
            options = json.dumps({**rendezvous, "rank": rank})
            command = [sys.executable, "-m", "megatron_fp16rl.tools.bench.sync", options]
            log = logs / f"receiver_{rank}.log"
            children.append(spawn(command, log, {**devices, "LOCAL_RANK": "0"}))
        yield lambda: _join(rank=0, **rendezvous)
    finally:
        stop(children, patience_s=0)


def _join(**rendezvous: Any) -> "dist.ProcessGroup":
    platform.current().prepare_sglang()
    from sglang.srt.utils import init_custom_process_group

    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    return init_custom_process_group(group_name=_GROUP, timeout=timeout, **rendezvous)


def _bare_broadcast(size: int, group: "dist.ProcessGroup") -> Callable[[], float]:
    """A function that takes part in a broadcast of rank 0's `size` bytes; returns its seconds."""
    device = platform.current().device()
    sizes = torch.tensor([size], device=device)
    dist.broadcast(sizes, group=group, group_src=0)
    size = int(sizes)  # receivers did not know it
    buffer = torch.zeros(min(size, _CHUNK), dtype=torch.uint8, device=device)

    def broadcast() -> float:
        dist.barrier(group=group)
        began = time.perf_counter()
        for start in range(0, size, _CHUNK):
            dist.broadcast(buffer[: min(_CHUNK, size - start)], group=group, group_src=0)
        dist.barrier(group=group)
        return time.perf_counter() - began

    return broadcast


def _receive() -> None:
    """The other end of the bare broadcasts: receives them until this process is killed."""
    die_with_parent()
    broadcast = _bare_broadcast(0, _join(**json.loads(sys.argv[1])))
    while True:
        broadcast()


if __name__ == "__main__":
    _receive()
