"""A whole run on this machine: rollout servers and learner ranks, which nothing outlives."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from launch import outcome
from launch.cause import CAUSE_FILE, Cause, rank_log
from launch.rank import HUNG, RECIPE_FILE, SERVERS
from megatron_fp16rl.files import write_json, write_text
from megatron_fp16rl.processes import free_port, spawn, stop, tail
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.server import announced, give_up
from megatron_fp16rl.weights.build import model_folder
from megatron_fp16rl.weights.families import check_served, describe, load_config, routing

LOCK_FILE = ".lock"
_PRIVATE = 0o700
_LET_OTHERS_END_S = 0.3


class RunInUse(RuntimeError):
    """Another launcher works in the run directory."""


class RankDied(RuntimeError):
    """A learner rank ended with an error. The message holds its last log lines."""


def new_run_folder(root: Path, name: str) -> Path:
    """Makes root/name, or root/name-2, ... : an earlier run is never written over.

    It is for this user's eyes only: it holds keys, prompts and what the model answered.
    """
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(mode=_PRIVATE)
        except FileExistsError:
            continue
        return folder
    raise RuntimeError(f"{root} holds too many runs called {name}")


def run(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> str:
    """Runs a recipe in `folder`, a new run directory or one that has checkpoints to go on from.

    Returns how it ended, "done" or "stopped" (on SIGUSR1, after a step and with a checkpoint). Ranks
    that died are started again, from the last checkpoint, `trainer.max_restarts` times; then, and
    for an error that would come again, raises RankDied with the reason. Raises RunInUse.
    Ctrl-C and SIGTERM raise KeyboardInterrupt. Whatever happens, servers and ranks are gone when
    this returns, and the kernel kills them should this process be killed.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    with alone_in(folder):
        (folder / "private").mkdir(mode=_PRIVATE, exist_ok=True)
        outcome.clear(folder)
        signal.signal(signal.SIGUSR1, lambda *_: outcome.ask_to_stop(folder))
        return _Local(recipe, folder, say).run()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the run directory's lock, which the kernel frees when this process ends.

    The file says who holds it. Raises RunInUse if another does.
    """
    with (folder / LOCK_FILE).open("a") as lock:
        if not _locked(lock):
            raise RunInUse(f"{folder} is in use by another fp16rl train; wait or stop it")
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} {os.getpid()}\n")
        lock.flush()
        yield


def holder(folder: Path) -> tuple[str, int] | None:
    """Host and process id of the launcher that works in a run directory, if one does."""
    try:
        lock = (folder / LOCK_FILE).open()
    except FileNotFoundError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            host, pid = lock.read().split()
            return host, int(pid)
    return None


def _locked(lock: TextIO) -> bool:
    for _ in range(10):  # `holder` may hold it for an instant
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


class _Local:
    """The processes of one run on this machine."""

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.folder, self.say = recipe, folder, say
        self.servers = 0 if recipe.rollout.replay else recipe.rollout.servers
        self.keepers: list[subprocess.Popen] = []
        self.ranks: list[subprocess.Popen] = []
        self._told = -1

    def run(self) -> str:
        logs = self._new_attempt()
        try:
            self._check()
            self._start_keepers(logs)
            for left in range(self.recipe.trainer.max_restarts, -1, -1):
                self._start_ranks(logs)
                cause = self._watch(logs)
                stop(self.ranks, patience_s=0 if cause else 5)
                ended = outcome.read(self.folder)
                if ended is not None and ended.word != outcome.FAILED:
                    return ended.word
                write_json(logs / CAUSE_FILE, cause.as_dict())
                if ended is not None:
                    raise RankDied(f"{cause}{self._last_words()}")
                if not left:
                    raise RankDied(
                        f"{cause}\ntrainer.max_restarts={self.recipe.trainer.max_restarts} used up"
                    )
                self.say(f"{cause}\nstarting the ranks again, from the last checkpoint")
                logs = self._new_attempt()
            raise AssertionError("not reached")
        finally:
            stop(self.ranks)
            stop(self.keepers)

    def _check(self) -> None:
        """What the model does not fit is refused before anything starts."""
        config = load_config(model_folder(self.recipe.model))
        describe(config, self.recipe.learner)
        if self.servers:
            check_served(config)
        if self.recipe.rollout.router_replay:
            routing(config)

    def _new_attempt(self) -> Path:
        number = len(list((self.folder / "logs").glob("attempt_*")))
        logs = self.folder / "logs" / f"attempt_{number}"
        write_text(self.folder / RECIPE_FILE, self.recipe.to_yaml())
        write_text(logs / RECIPE_FILE, self.recipe.to_yaml())
        shutil.rmtree(self.folder / HUNG, ignore_errors=True)
        return logs

    def _start_keepers(self, logs: Path) -> None:
        shutil.rmtree(self.folder / SERVERS, ignore_errors=True)  # of servers that are no more
        self.say(f"starting {self.servers} rollout server(s), {self.recipe.learner.ranks} rank(s)")
        for index in range(self.servers):
            command = [sys.executable, "-m", "launch.server", *map(str, (self.folder, logs, index))]
            self.keepers.append(spawn(command, logs / f"server_{index}.log"))

    def _start_ranks(self, logs: Path) -> None:
        port = free_port("127.0.0.1")
        self.ranks = []
        for rank in range(self.recipe.learner.ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.recipe.learner.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            log = rank_log(logs, rank)
            command = [sys.executable, "-m", "launch.rank", str(self.folder)]
            if rank == 0:
                self.ranks.append(spawn(command, log, environment, stdout=subprocess.PIPE))
                output = self.ranks[0].stdout
                threading.Thread(target=_show, args=(output, log), daemon=True).start()
            else:
                self.ranks.append(spawn(command, log, environment))

    def _watch(self, logs: Path) -> Cause | None:
        """Waits for the ranks: until all are done, or one has ended otherwise."""
        began = time.monotonic()
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if any(codes):
                time.sleep(_LET_OTHERS_END_S)  # who died first takes others along
                return Cause.of([rank.poll() for rank in self.ranks], logs, self.folder / HUNG)
            if all(code == 0 for code in codes):
                return None
            self._look_after_servers(time.monotonic() - began)
            time.sleep(0.2)

    def _look_after_servers(self, elapsed: float) -> None:
        if self._servers_are_gone():
            give_up(self.folder / SERVERS)  # the ranks save, and end
        elif self._told < self.servers:
            up = len(announced(self.folder / SERVERS))
            if up > self._told:
                self._told = up
                self.say(f"{up}/{self.servers} servers up after {elapsed:.0f} s")

    def _servers_are_gone(self) -> bool:
        return bool(self.keepers) and all(keeper.poll() is not None for keeper in self.keepers)

    def _last_words(self) -> str:
        """Of servers that are gone."""
        if not self._servers_are_gone():
            return ""
        log = sorted((self.folder / "logs").glob("attempt_*/server_0.log"))[-1]
        return f"\nno rollout server is left. Last lines of {log}:\n{tail(log)}"


def _show(output: object, log: Path) -> None:
    """Copies rank 0's lines to the terminal and to its log."""
    with log.open("ab") as file:
        for line in output:
            file.write(line)
            file.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.flush()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
