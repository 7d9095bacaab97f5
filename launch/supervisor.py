"""The supervisor of a run: starts rollout servers and learner ranks, restarts ranks, decides the end.

One policy for all ways to start processes: on this machine (launch/local.py) and with srun in a job (here).
Under mpirun the ranks are started already, and die together (launch/mpi.py).

A batch script ends with `exec python -m launch.supervisor RUN_DIR ... -- srun ...`. If the ranks run in a
container, that is the host's python3: this module and what it imports need Python 3.9 and no package.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launch import lock, outcome
from launch.cause import find
from launch.outcome import DIED, DONE, FAILED, STOPPED, Outcome
from megatron_fp16rl.rollout.discovery import mark_all_failed, registered
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.processes import stop, tail

# A dead rank breaks the connections of its peers: time for them to log that.
_GRACE_S = 0.5
_POLL_S = 0.2
_SERVERS_END_S = 120.0  # servers of a job look for its end every second
_JOB_LOCK_S = 3.0  # an earlier start of the same job may take a moment to end
# Each process opens its own log: srun's %t is wrong on most nodes of Slurm 24.11.
_TO_LOG = 'exec >>"$0_$SLURM_PROCID.log" 2>&1; exec "$@"'

Child = subprocess.Popen


class Launcher(Protocol):
    """A way to start the processes of a run."""

    def start_servers(self, logs: Path) -> list[Child]:
        """The supervisors of the rollout servers, which restart their servers themselves."""

    def start_ranks(self, logs: Path) -> list[Child]:
        """The learner ranks. Each writes how it ended into `private/outcome` and `logs`."""

    def end_ranks(self, ranks: list[Child], logs: Path) -> list[int | None]:
        """Kills ranks that are left. Returns exit codes by rank, None where the code is unknown."""

    def end_servers(self, servers: list[Child]) -> None:
        """Ends the servers of a run that is over."""


@contextlib.contextmanager
def owning(folder: Path, job: str | None = None, patience_s: float = 1.0) -> Iterator[None]:
    """This process works on the run, alone: takes the lock and forgets how the run ended before.

    SIGUSR1 asks the run to stop after its step. Raises RunInUse.
    """
    with lock.alone_in(folder, job, patience_s):
        (folder / "private").mkdir(mode=0o700, exist_ok=True)
        outcome.clear(folder)
        shutil.rmtree(folder / outcome.SERVERS, ignore_errors=True)  # of servers that are gone
        signal.signal(signal.SIGUSR1, lambda *_: outcome.ask_to_stop(folder))
        yield


def supervise(
    folder: Path, launcher: Launcher, max_restarts: int, say: Callable[[str], None]
) -> Outcome:
    """Runs servers and ranks until the run is over; returns how it ended.

    Ranks that died start again from the last checkpoint, in a new attempt. They do not if the error
    would come again (outcome "failed"), if the run is asked to stop, or after `max_restarts` restarts
    without a new checkpoint. The servers outlive the ranks. The reason of "died" and "failed" holds the
    first cause and its log.
    """
    restarts, checkpoint = 0, _last_checkpoint(folder)
    logs = outcome.begin_attempt(folder)
    ranks: list[Child] = []
    servers: list[Child] = []
    try:
        servers = launcher.start_servers(logs)
        while True:
            ranks = launcher.start_ranks(logs)
            _wait_for_ranks(ranks, servers, folder, say)
            codes = launcher.end_ranks(ranks, logs)
            # srun's exit code is that of any rank: what became of the run is in a file.
            ended = outcome.read(folder)
            if ended is not None and ended.word != FAILED:
                return ended
            cause = find(logs, codes)
            cause.write(logs)
            if ended is not None:  # a restart would fail again
                return Outcome(
                    FAILED, f"{cause.cause}. {cause.excerpt}{_servers_log(servers, folder)}"
                )
            if outcome.is_asked_to_stop(folder):  # there may be no time for a restart
                say(cause.cause)
                return Outcome(STOPPED)
            # A run that gets further may have any number of faults; one that does not ends.
            if (newest := _last_checkpoint(folder)) != checkpoint:
                restarts, checkpoint = 0, newest
            if restarts == max_restarts:
                used = f"trainer.max_restarts={max_restarts} are used up without a new checkpoint"
                return Outcome(DIED, f"{cause.cause}; {used}. {cause.excerpt}")
            say(cause.cause)
            restarts += 1
            say(f"restart {restarts} of {max_restarts}, from the last checkpoint")
            logs = outcome.begin_attempt(folder)
    finally:
        stop(ranks, patience_s=0)  # what they have to save is saved
        launcher.end_servers(servers)


def _wait_for_ranks(
    ranks: list[Child], servers: list[Child], folder: Path, say: Callable[[str], None]
) -> None:
    """Returns when all ranks are done, or one has failed."""
    began, healthy = time.monotonic(), 0
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            time.sleep(_GRACE_S)
            return
        if all(code == 0 for code in codes):
            return
        if _all_ended(servers):
            # The learner stops waiting for a server to come back: it saves and ends.
            mark_all_failed(folder / outcome.SERVERS)
        up = len(registered(folder / outcome.SERVERS))
        if up > healthy:
            healthy = up
            say(f"{up} server(s) up after {time.monotonic() - began:.0f} s")
        time.sleep(_POLL_S)


def _last_checkpoint(folder: Path) -> str:
    return os.path.realpath(folder / "checkpoints" / "latest")


def _all_ended(servers: list[Child]) -> bool:
    return bool(servers) and all(server.poll() is not None for server in servers)


def _servers_log(servers: list[Child], folder: Path) -> str:
    """The end of a server's log, if no server is left."""
    logs = list(folder.glob("logs/attempt_*/server_0.log"))
    if not _all_ended(servers) or not logs:
        return ""
    log = max(logs, key=lambda file: file.stat().st_mtime)
    return f"\nno rollout server is left. Last lines of {log}:\n{tail(log)}"


@dataclass
class Srun:
    """Starts servers and ranks as steps of this Slurm job.

    srun: its words for every step; program: Python on the nodes, in the container if there is one;
    learner, servers, preflight: how many tasks on which nodes, empty for no such step.
    """

    folder: Path
    srun: Sequence[str]
    program: Sequence[str]
    learner: Sequence[str]
    servers: Sequence[str]
    preflight: Sequence[str]

    def start_servers(self, logs: Path) -> list[Child]:
        """Preflight first: an unfit node is known before a model loads. Raises ExplainedError."""
        if self.preflight:
            log = logs / "preflight.log"
            command = [*self.srun, *self.preflight, *self.program, "-m", "launch.preflight"]
            with log.open("ab") as output:
                if subprocess.call(
                    [*command, str(self.folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                ):
                    report = log.read_text(errors="replace")
                    raise ExplainedError(f"the preflight failed, see {log}:\n{report}")
        for file in (self.folder / "private").glob("server_*.rendezvous.json"):
            file.unlink()
        if not self.servers:
            return []
        # One server that gives up must not take the others along.
        options = [*self.servers, "--kill-on-bad-exit=0"]
        return [self._step(options, logs / "supervisor", "launch.server_supervisor", str(logs))]

    def start_ranks(self, logs: Path) -> list[Child]:
        options = [*self.learner, "--kill-on-bad-exit=1"]
        return [self._step(options, logs / "rank", "launch.rank")]

    def end_ranks(self, ranks: list[Child], logs: Path) -> list[int | None]:
        stop(ranks, patience_s=0)
        return [None] * max(1, len(list(logs.glob("rank_*.log"))))

    def end_servers(self, servers: list[Child]) -> None:
        """Server supervisors end when the run has an outcome: Slurm's SIGTERM may be a warning only."""
        if outcome.read(self.folder) is None:
            outcome.write(self.folder, DIED)
        for server in servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_SERVERS_END_S)
        stop(servers, patience_s=0)

    def _step(self, options: Sequence[str], log: Path, module: str, *words: str) -> Child:
        command = [*self.srun, "--mpi=none", *options, "sh", "-c", _TO_LOG, str(log)]
        command += [*self.program, "-m", module, str(self.folder), *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def main() -> int:
    """Supervises the run of a batch script, on its first node; returns the job's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-restarts", type=int, required=True)
    for name in ("program", "learner", "servers", "preflight"):
        parser.add_argument(
            f"--{name}", type=shlex.split, default=[], help="words, quoted for a shell"
        )
    parser.add_argument("srun", nargs="+", help="and its options for every step")
    arguments = vars(parser.parse_args())
    folder, max_restarts = arguments.pop("folder"), arguments.pop("max_restarts")
    try:
        with owning(folder, os.environ.get("SLURM_JOB_ID"), _JOB_LOCK_S):
            os.environ[lock.HELD] = "1"
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, lambda *_: _ask_to_stop(folder))
            try:
                ended = supervise(folder, Srun(folder, **arguments), max_restarts, _say)
            except ExplainedError as error:
                ended = Outcome(FAILED, str(error))
                outcome.write(folder, *vars(ended).values())
    except lock.RunInUse as error:  # nothing in the directory is ours to write
        print(f"error: {error}", file=sys.stderr)
        return 1
    _say(f"outcome: {ended.word}")
    if ended.word == DONE or (ended.word == STOPPED and (folder / outcome.CANCELLED).exists()):
        return 0
    if ended.word == STOPPED:
        return _requeue(folder)
    _say(ended.reason)
    return 1


def _ask_to_stop(folder: Path) -> None:
    """The time limit is near, or the job is preempted: the learner saves after its step and ends."""
    outcome.ask_to_stop(folder)
    os.write(1, b"asked to stop\n")  # print may be what the signal has interrupted


def _requeue(folder: Path) -> int:
    """Puts this job back into the queue, where it goes on from the checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
        return 0
    reason = f"Slurm does not requeue job {job}; to go on: fp16rl submit --resume {folder}"
    outcome.write(folder, FAILED, reason)
    print(f"error: {reason}", file=sys.stderr)
    return 1


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
