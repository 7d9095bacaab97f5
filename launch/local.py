"""A whole run on this machine: rollout servers and learner ranks as child processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from launch import outcome, server_supervisor
from launch.cause import rank_log
from launch.lock import HELD
from launch.run_folder import absolute, writable
from launch.server_supervisor import place
from launch.supervisor import Child, owning, supervise
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.spec import check_served, describe, routing
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.processes import free_port, local_rank_environment, spawn, stop
from megatron_fp16rl.utils.terminal import printable

_LAST_LINES_S = 5  # until rank 0's last lines are shown


class RankDied(ExplainedError):
    """A learner rank ended with an error. The message holds its last log lines."""


@dropped_if_unread()
def run(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> str:
    """Runs a recipe in `folder`, a new run directory or one with checkpoints to resume from.

    Returns "done" or "stopped" (on SIGUSR1, after a step and with a checkpoint). Raises RankDied when
    the ranks have failed for good (see `supervise`), RunInUse and Unwritable. Ctrl-C and SIGTERM raise
    KeyboardInterrupt. The run goes on when its terminal is closed (SIGHUP), or nobody reads its output.
    Servers and ranks are gone when this returns; the kernel kills them if this process is killed.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, lambda *_: None)
    with writable(folder), owning(folder):
        recipe = absolute(recipe)
        _check_model(recipe)
        write_text(folder / outcome.RECIPE_FILE, recipe.to_yaml())
        launcher = _Local(recipe, folder, say)
        ended = supervise(folder, launcher, recipe.trainer.max_restarts, say)
    if ended.word in (outcome.FAILED, outcome.DIED):
        raise RankDied(ended.reason)
    return ended.word


def _check_model(recipe: Recipe) -> None:
    """Refuses what the model does not support before anything starts."""
    config = load_config(model_folder(recipe.model))
    describe(config, recipe.learner)
    if recipe.servers:
        check_served(config)
    if recipe.rollout.router_replay:
        routing(config)


class _Local:
    """Starts processes on this machine, which die with this one."""

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.folder, self.say = recipe, folder, say
        self._shown = threading.Thread()  # copies what rank 0 prints

    def start_servers(self, logs: Path) -> list[Child]:
        servers, ranks = self.recipe.servers, self.recipe.learner.ranks
        self.say(f"starting {servers} rollout server(s), {ranks} rank(s)")
        children = []
        for index in range(servers):
            where = place(self.recipe.rollout, index, index, ranks, self.recipe.rollout.host)
            log = logs / f"server_{index}.log"
            children.append(server_supervisor.start(self.folder, logs, where, log))
        return children

    def start_ranks(self, logs: Path) -> list[Child]:
        port = free_port("127.0.0.1")
        ranks = []
        for rank in range(self.recipe.learner.ranks):
            environment = {
                **local_rank_environment(rank, self.recipe.learner.ranks, port),
                "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "=lo"),  # as servers
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                HELD: "1",
            }
            log = rank_log(logs, rank)
            command = [sys.executable, "-m", "launch.rank", str(self.folder)]
            # Rank 0's lines go to the terminal, too.
            output = {} if rank else {"stdout": subprocess.PIPE}
            ranks.append(spawn(command, log, environment, **output))
        self._shown = threading.Thread(
            target=_show, args=(ranks[0].stdout, rank_log(logs, 0)), daemon=True
        )
        self._shown.start()
        return ranks

    def end_ranks(self, ranks: list[Child], logs: Path) -> list[int | None]:
        codes = [rank.poll() for rank in ranks]
        stop(ranks, patience_s=0)
        self._shown.join(_LAST_LINES_S)
        return codes

    def end_servers(self, servers: list[Child]) -> None:
        stop(servers)


def _show(output: IO[bytes], log: Path) -> None:
    """Copies rank 0's lines to the terminal and to its log.

    Goes on when the disk is full: rank 0 must not wait for a reader.
    """
    with log.open("ab", buffering=0) as file:
        for line in output:
            with contextlib.suppress(OSError):
                file.write(line)
            sys.stdout.buffer.write(printable(line.decode(errors="replace")).encode())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
