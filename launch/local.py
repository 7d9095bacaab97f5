"""A whole run on this machine: rollout servers and learner ranks, which nothing outlives."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from launch import outcome
from launch.cause import Cause, rank_log
from launch.lock import HELD, alone_in
from launch.lock import holder as holder  # who works in a run directory is asked here too
from launch.paths import absolute
from launch.rank import RECIPE_FILE, SERVERS
from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.families import check_served, describe, routing
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.discovery import mark_all_failed, registered
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import is_full, is_refused, write_text
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.processes import free_port, spawn, stop, tail
from megatron_fp16rl.utils.terminal import printable

_PRIVATE = 0o700
# From the end of one rank to those of the others that lose their connection to it.
_LET_OTHERS_END_S = 0.5
_LAST_LINES_S = 5  # until what rank 0 said before its end is shown


class Unwritable(ExplainedError):
    """A run directory cannot be written to. The message names the remedy."""


class RankDied(ExplainedError):
    """A learner rank ended with an error. The message holds its last log lines."""


def new_run_folder(root: Path, name: str) -> Path:
    """Makes root/name, or root/name-2, ... : an earlier run is never written over.

    It is for this user's eyes only: it holds keys, prompts and what the model answered. Raises
    Unwritable.
    """
    with writable(root):
        return _new_run_folder(root, name)


def _new_run_folder(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(mode=_PRIVATE)
        except FileExistsError:
            continue
        return folder
    raise RuntimeError(f"{root} holds too many runs called {name}")


@dropped_if_unread()
def run(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> str:
    """Runs a recipe in `folder`, a new run directory or one that has checkpoints to go on from.

    Returns how it ended, "done" or "stopped" (on SIGUSR1, after a step and with a checkpoint). Ranks
    that died or hang are started again, from the last checkpoint, `trainer.max_restarts` times; then,
    and for an error that would come again, raises RankDied with the reason. Raises RunInUse and
    Unwritable.
    Ctrl-C and SIGTERM raise KeyboardInterrupt; the end of the terminal (SIGHUP), or of whoever reads what
    is printed, is no end of the run. Whatever happens, servers and ranks are gone when
    this returns, and the kernel kills them should this process be killed.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, lambda *_: None)
    with writable(folder), alone_in(folder):
        (folder / "private").mkdir(mode=_PRIVATE, exist_ok=True)
        outcome.clear(folder)
        signal.signal(signal.SIGUSR1, lambda *_: outcome.ask_to_stop(folder))
        return _Local(absolute(recipe), folder, say).run()


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Raises Unwritable if the block finds that it cannot write into a folder."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise Unwritable(f"no space left: {checkpoint_files.space_report(folder)}") from None
        if is_refused(error):
            raise Unwritable(
                f"{folder} cannot be written to: {error.strerror}. Mount it read-write, mind its "
                "permissions, or run elsewhere (trainer.run_root)"
            ) from None
        raise


class _Local:
    """The processes of one run on this machine."""

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.folder, self.say = recipe, folder, say
        self.servers = 0 if recipe.rollout.replay else recipe.rollout.servers
        self.keepers: list[subprocess.Popen] = []
        self.ranks: list[subprocess.Popen] = []
        self._shown: threading.Thread  # of what rank 0 says
        self._told = -1

    def run(self) -> str:
        self._check()
        restarts = Restarts(self.folder, self.recipe.trainer.max_restarts)
        logs = self._new_attempt()
        try:
            self._start_keepers(logs)
            while True:
                self._start_ranks(logs)
                cause = self._watch(logs)
                stop(self.ranks, patience_s=0)
                self._shown.join(_LAST_LINES_S)
                ended = outcome.read(self.folder)
                if ended is not None and ended.word != outcome.FAILED:
                    return ended.word
                if not self._may_restart(cause, restarts):
                    return outcome.STOPPED
                logs = self._new_attempt()
        finally:
            stop(self.ranks, patience_s=0)  # what they have to save is saved
            stop(self.keepers)

    def _may_restart(self, cause: Cause, restarts: "Restarts") -> bool:
        """Whether dead ranks are started again, or the run was to stop anyway. Raises RankDied."""
        if outcome.read(self.folder) is not None:  # failed: the same would happen again
            raise RankDied(f"{cause.cause}. {cause.excerpt}{self._last_words()}")
        self.say(cause.cause)
        if outcome.is_asked_to_stop(self.folder):
            return False
        if reason := restarts.refusal():
            raise RankDied(f"{cause.cause}; {reason}. {cause.excerpt}")
        self.say(f"restart {restarts.used} of {restarts.most}, from the last checkpoint")
        return True

    def _check(self) -> None:
        """What the model does not fit is refused before anything starts."""
        config = load_config(model_folder(self.recipe.model))
        describe(config, self.recipe.learner)
        if self.servers:
            check_served(config)
        if self.recipe.rollout.router_replay:
            routing(config)

    def _new_attempt(self) -> Path:
        logs = outcome.begin_attempt(self.folder)
        write_text(self.folder / RECIPE_FILE, self.recipe.to_yaml())
        write_text(logs / RECIPE_FILE, self.recipe.to_yaml())
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
                "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "=lo"),  # as servers
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                HELD: "1",
            }
            log = rank_log(logs, rank)
            command = [sys.executable, "-m", "launch.rank", str(self.folder)]
            if rank == 0:
                self.ranks.append(spawn(command, log, environment, stdout=subprocess.PIPE))
                output = self.ranks[0].stdout
                self._shown = threading.Thread(target=_show, args=(output, log), daemon=True)
                self._shown.start()
            else:
                self.ranks.append(spawn(command, log, environment))

    def _watch(self, logs: Path) -> Cause | None:
        """Waits for the ranks: until all are done, or one has ended otherwise; why that was."""
        began = time.monotonic()
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if any(codes):
                time.sleep(_LET_OTHERS_END_S)  # who died first takes others along
                cause = Cause.find(logs, [rank.poll() for rank in self.ranks])
                cause.write(logs)
                return cause
            if all(code == 0 for code in codes):
                return None
            self._look_after_servers(time.monotonic() - began)
            time.sleep(0.2)

    def _look_after_servers(self, elapsed: float) -> None:
        if self._servers_are_gone():
            mark_all_failed(self.folder / SERVERS)  # the ranks save, and end
        elif self._told < self.servers:
            up = len(registered(self.folder / SERVERS))
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


class Restarts:
    """Whether ranks that died are started again: `most` times, but not from a crash to the same.

    Twice in a row without a step that was not made before is enough.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self.used = self._idle = 0
        saved = checkpoint_files.available(folder / "checkpoints")
        self._furthest = saved[0].step if saved else 0

    def refusal(self) -> str | None:
        """Takes one more restart; if there is none, says why."""
        reached = 1 + max((row["step"] for row in metrics.read(self.folder).rows), default=-1)
        self._idle = 0 if reached > self._furthest else self._idle + 1
        self._furthest = max(reached, self._furthest)
        if self.used == self.most:
            return f"trainer.max_restarts={self.most} are used up"
        if self._idle == 2:
            return f"twice in a row no step was made after step {self._furthest}: not started again"
        self.used += 1
        return None


def _show(output: object, log: Path) -> None:
    """Copies rank 0's lines to the terminal and to its log, if these can be written.

    Under `dropped_if_unread`, and whatever becomes of the disk: rank 0 must not wait for a reader.
    """
    with log.open("ab", buffering=0) as file:
        for line in output:
            with contextlib.suppress(OSError):
                file.write(line)
            sys.stdout.buffer.write(printable(line.decode(errors="replace")).encode())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
