"""Asking Slurm: submit a script, look at jobs, end them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import sbatch
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import answer

JOBS = "jobs"  # in a run directory: the numbers of its jobs, one a line
TIMEOUT_S = 60
_OF = "# of "  # in the first line: the run whose jobs these are
_NUMBER = re.compile(r"(\d+)(;[\w.-]+)?")  # 42, or 42;name of a cluster
_MAYBE = "It may take the job all the same: look with squeue --me before you submit again"
_GONE = ("Invalid job id", "already completing or completed")
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
# A job in any other state, of a later version too, may still work on its run.
_OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
)


class SlurmError(ExplainedError):
    """Slurm refused, or is not here. The message holds its reason."""


@dataclass(frozen=True)
class Job:
    """A job in Slurm's words. reason: why it waits or ended; left: of its time."""

    state: str
    reason: str = ""
    nodes: str = ""
    left: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it has no nodes yet."""
        return self.state in _WAITING

    @property
    def is_alive(self) -> bool:
        """Whether it waits, runs or is on its way in or out."""
        return self.state not in _OVER


def available() -> bool:
    """Whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None


def check(script: str) -> str:
    """What Slurm would do with a script's text (`sbatch --test-only`). Raises SlurmError if it refuses."""
    done = _sbatch("--test-only", script)
    return (done.stdout + done.stderr).strip()  # it answers on stderr


def submit(script: Path) -> str:
    """Puts a script into the queue; returns the job's number, and records it. Raises SlurmError.

    What a site's sbatch prints besides goes to stderr.
    """
    text = script.read_text()
    done = _sbatch("--parsable", text)
    lines = [line.strip() for line in done.stdout.splitlines()]
    numbers = [match[1] for line in lines if (match := _NUMBER.fullmatch(line))]
    rest = [line for line in lines if line and not _NUMBER.fullmatch(line)]
    rest += done.stderr.splitlines()
    if not numbers:
        raise SlurmError(f"sbatch named no job: {' '.join(rest)!r}. {_MAYBE}")
    if rest:
        print("\n".join(rest), file=sys.stderr)
    record(script.parent, numbers[-1])
    # The run's script is written again at a resume, and Slurm forgets its copy.
    write_text(script.parent / "logs" / f"job_{numbers[-1]}.sbatch", text)
    return numbers[-1]


def record(folder: Path, job: str) -> None:
    """Keeps the number of a job of a run, for when Slurm has forgotten it."""
    lines = [f"{_OF}{folder.resolve()}", *jobs(folder), job]
    write_text(folder / JOBS, "".join(f"{line}\n" for line in lines))


def jobs(folder: Path) -> list[str]:
    """Numbers of all jobs that a run was ever submitted as. A copy of a run has none of them."""
    file = folder / JOBS
    lines = file.read_text(errors="replace").split("\n") if file.exists() else []
    original = lines[0].removeprefix(_OF) if lines and lines[0].startswith(_OF) else ""
    if os.path.isdir(original) and not os.path.samefile(original, folder):
        return []
    return [line for line in lines if line.isascii() and line.isdecimal()]


def cancel(job: str) -> None:
    """Ends a job. Raises SlurmError."""
    _ask("scancel", job)


def ask_to_save(job: str) -> None:
    """Asks the supervisor of a running job to save and end. Raises SlurmError."""
    _ask("scancel", "--batch", "--signal=USR1", job)


def queue(numbers: Sequence[str]) -> dict[str, Job]:
    """What Slurm knows of jobs, by number; it forgets those that ended long ago. Raises SlurmError."""
    if not numbers:
        return {}
    known: dict[str, Job] = {}
    options = ("-h", "-t", "all", "-o", "%i|%T|%N|%L|%r", "-j", ",".join(numbers))
    for line in _ask("squeue", *options):
        number, *fields = line.split("|", 4)
        if len(fields) == 4:  # else a banner
            state, nodes, left, reason = fields
            known[number] = Job(state, reason, nodes, left)
    return known


def _ask(command: str, *words: str) -> list[str]:
    """The lines of an answer about one job or several; none if Slurm has forgotten them."""
    # The user's own defaults would hide jobs, and ask before they cancel.
    own = ("SQUEUE_", "SCANCEL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    try:
        return _run(environment, "", command, *words).stdout.splitlines()
    except SlurmError as error:
        if any(gone in str(error) for gone in _GONE):
            return []
        raise


def _sbatch(option: str, script: str) -> subprocess.CompletedProcess[str]:
    return _run(sbatch.shell(os.environ, script), script, "sbatch", option)


def _run(
    environment: Mapping[str, str], typed: str, *command: str
) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on this machine: submit from a cluster's login node")
    try:
        done = answer(command, TIMEOUT_S, env=environment, input=typed)
    except subprocess.TimeoutExpired:
        maybe = f". {_MAYBE}" if command[0] == "sbatch" else ""
        raise SlurmError(f"{command[0]} did not answer in {TIMEOUT_S} s{maybe}") from None
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]}: {message.removeprefix(f'{command[0]}: ')}")
    return done
