"""A whole run on this machine: rollout servers and learner ranks, which nothing outlives."""

import contextlib
import fcntl
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from launch.rank import ENDPOINTS_FILE, RECIPE_FILE
from megatron_fp16rl.files import write_text
from megatron_fp16rl.processes import free_port, spawn, stop, tail
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout import server as rollout_server
from megatron_fp16rl.weights.build import model_folder
from megatron_fp16rl.weights.families import check_served, describe, load_config, routing

_PRIVATE = 0o700


class RunInUse(RuntimeError):
    """Another launcher works in the run directory."""


class RankDied(RuntimeError):
    """A learner rank ended with an error. The message holds its last log lines."""


def new_run_folder(root: Path, name: str) -> Path:
    """Makes root/name, or root/name-2, ... : an earlier run is never written over."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise RuntimeError(f"{root} holds too many runs called {name}")


def run(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """Runs a recipe in `folder`, a new run directory or one that has checkpoints to go on from.

    Returns when all ranks are done. Raises RunInUse, ServerDied or RankDied, with the last lines of the log that tells why. Ctrl-C and SIGTERM
    raise KeyboardInterrupt. Whatever happens, servers and ranks are gone when this returns, and the
    kernel kills them should this process be killed.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    with _alone_in(folder):
        _run(recipe, folder, say)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds the run directory's lock, which the kernel frees when this process ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUse(f"{folder} is in use by another fp16rl train; wait or stop it") from None
        yield


def _run(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    attempt = len(list((folder / "logs").glob("attempt_*")))
    logs, private = folder / "logs" / f"attempt_{attempt}", folder / "private"
    private.mkdir(mode=_PRIVATE, exist_ok=True)
    (folder / ENDPOINTS_FILE).unlink(missing_ok=True)  # of servers that are no more
    write_text(folder / RECIPE_FILE, recipe.to_yaml())
    write_text(logs / RECIPE_FILE, recipe.to_yaml())
    servers: list[rollout_server.Server] = []
    ranks: list[subprocess.Popen] = []
    try:
        weights = model_folder(recipe.model)
        # What the model does not fit is refused before anything starts.
        config = load_config(weights)
        describe(config, recipe.learner)
        if not recipe.rollout.replay:
            check_served(config)
        if recipe.rollout.router_replay:
            routing(config)
        for index in range(0 if recipe.rollout.replay else recipe.rollout.servers):
            serving = rollout_server.Serving.of(recipe)
            servers.append(rollout_server.start(serving, weights, private, logs, index))
        ranks = _start_ranks(recipe, folder, logs)
        say(f"starting {len(servers)} rollout server(s) and {len(ranks)} learner rank(s)")
        _announce_servers(recipe, servers, ranks, folder, logs, say)
        while not _all_done(ranks, logs):
            for server in servers:
                rollout_server.check_alive(server)
            time.sleep(0.2)
    finally:
        stop(ranks)
        rollout_server.stop_servers(servers)


def _start_ranks(recipe: Recipe, folder: Path, logs: Path) -> list[subprocess.Popen]:
    port = free_port("127.0.0.1")
    ranks = []
    for rank in range(recipe.learner.ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(recipe.learner.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        log = _rank_log(logs, rank)
        command = [sys.executable, "-m", "launch.rank", str(folder)]
        if rank == 0:
            ranks.append(spawn(command, log, environment, stdout=subprocess.PIPE))
            threading.Thread(target=_show, args=(ranks[0].stdout, log), daemon=True).start()
        else:
            ranks.append(spawn(command, log, environment))
    return ranks


def _show(output: object, log: Path) -> None:
    """Copies rank 0's lines to the terminal and to its log."""
    with log.open("ab") as file:
        for line in output:
            file.write(line)
            file.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.flush()


def _announce_servers(
    recipe: Recipe,
    servers: list[rollout_server.Server],
    ranks: list[subprocess.Popen],
    folder: Path,
    logs: Path,
    say: Callable[[str], None],
) -> None:
    last = 0.0

    def progress(line: str) -> None:
        nonlocal last
        _all_done(ranks, logs)  # a rank that died while servers start must end the wait
        if time.monotonic() - last > 5 or line.startswith(f"{len(servers)}/"):
            last = time.monotonic()
            say(line)

    rollout_server.wait_until_healthy(servers, recipe.rollout.start_timeout_s, progress)
    rollout_server.write_endpoints(folder / ENDPOINTS_FILE, servers)


def _all_done(ranks: list[subprocess.Popen], logs: Path) -> bool:
    codes = [rank.poll() for rank in ranks]
    for rank, code in enumerate(codes):
        if code:
            log = _rank_log(logs, rank)
            raise RankDied(
                f"learner rank {rank} ended with code {code}. Last lines of {log}:\n{tail(log)}"
            )
    return all(code == 0 for code in codes)


def _rank_log(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.log"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
