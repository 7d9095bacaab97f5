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

JOBS = "jobs"  # in a run directory: the numbers of its jobs, one a line
TIMEOUT_S = 60
_OF = "# of "  # in the first line: the run whose jobs these are
_NUMBER = re.compile(r"\d+(_\d+)?(;[\w.-]+)?")  # 42, 42_3 of an array, 42;name of a cluster
_GONE = ("Invalid job id", "already completing or completed")
_WAITING = (
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
    "RESV_DEL_HOLD",
)
# A job in any other state, of a later version too, may still work on its run.
_OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
)


class SlurmError(ExplainedError):
    """Slurm refused, or is not here. The message holds its reason."""


class SlurmSilent(SlurmError):
    """Slurm did not answer."""


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


def check(script: Path) -> str:
    """What Slurm would do with a script (`sbatch --test-only`). Raises SlurmError if it refuses."""
    done = _sbatch("--test-only", script)
    return (done.stdout + done.stderr).strip()  # it answers on stderr


def submit(script: Path) -> str:
    """Puts a script into the queue; returns the job's number, and records it. Raises SlurmError.

    What a site's sbatch prints besides goes to stderr.
    """
    done = _sbatch("--parsable", script)
    lines = [line.strip() for line in done.stdout.splitlines()]
    numbers = [line for line in lines if _NUMBER.fullmatch(line)]
    rest = [line for line in (*lines, *done.stderr.splitlines()) if line and line not in numbers]
    if not numbers:
        raise SlurmError(
            f"sbatch named no job: {' '.join(rest)!r}. It may have taken it all the same: look with "
            "squeue --me before you submit it again"
        )
    if rest:
        print("\n".join(rest), file=sys.stderr)
    record(script.parent, numbers[-1])
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
    return [line for line in lines if is_number(line)]


def is_number(job: str) -> bool:
    """Whether it is written as `jobs` has them."""
    return _NUMBER.fullmatch(job) is not None


def task(job: str, index: int) -> str:
    """The number of a job of an array."""
    number, semicolon, cluster = job.partition(";")
    return f"{number}_{index}{semicolon}{cluster}"


def cancel(job: str) -> None:
    """Ends a job. Raises SlurmError."""
    _ask("scancel", job)


def ask_to_save(job: str) -> None:
    """Asks the supervisor of a running job to save and end. Raises SlurmError."""
    _ask("scancel", job, "--batch", "--signal=USR1")


def queue(numbers: Sequence[str]) -> tuple[dict[str, Job], dict[str, str]]:
    """What Slurm knows of jobs, by number; and why it was silent about others.

    Jobs that it has forgotten are in neither.
    """
    known: dict[str, Job] = {}
    silent: dict[str, str] = {}
    for cluster in sorted({number.partition(";")[2] for number in numbers}):
        suffix = f";{cluster}" if cluster else ""
        own = [number for number in numbers if number.partition(";")[2] == cluster]
        listed = ",".join(number.removesuffix(suffix) for number in own) + suffix
        try:
            lines = _ask("squeue", listed, "-h", "-r", "-t", "all", "-o", "%i|%T|%N|%L|%r")
        except SlurmError as error:
            silent |= dict.fromkeys(own, str(error))
            continue
        for line in lines:
            number, *fields = line.split("|", 4)
            if len(fields) == 4:  # else a banner
                state, nodes, left, reason = fields
                name = number.partition("+")[0] + suffix  # 12+0: of a heterogeneous job
                known.setdefault(name, Job(state, reason, nodes, left))
    return known, silent


def details(job: str) -> dict[str, str]:
    """What `scontrol show job` says; nothing if Slurm has forgotten it. Raises SlurmError."""
    lines = [line for line in _ask("scontrol", job) if line.startswith("JobId=")]
    # Names of files may have spaces in them.
    return dict(re.findall(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)", (*lines, "")[0]))


def _ask(command: str, job: str, *options: str) -> list[str]:
    """The lines of an answer about one job or several; none if Slurm has forgotten them."""
    numbers, _, cluster = job.partition(";")
    about = {"squeue": ["-j", numbers], "scancel": [numbers]}
    about["scontrol"] = ["-o", "show", "job", numbers]
    clusters = [f"--clusters={cluster}"] if cluster else []
    # The user's own defaults would hide jobs, and ask before they cancel.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SQUEUE_", "SCANCEL_"))
    }
    try:
        return _run(environment, command, *clusters, *options, *about[command]).stdout.splitlines()
    except SlurmError as error:
        if any(gone in str(error) for gone in _GONE):
            return []
        raise


def _sbatch(option: str, script: Path) -> subprocess.CompletedProcess[str]:
    environment = sbatch.shell(os.environ, script.read_text())
    try:
        return _run(environment, "sbatch", option, str(script))
    except SlurmSilent as error:
        raise SlurmError(
            f"{error}. It may take the job all the same: look with squeue --me before you submit it again"
        ) from None


def _run(environment: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on this machine: submit from a cluster's login node")
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{command[0]} did not answer in {TIMEOUT_S} s") from None
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]}: {message.removeprefix(f'{command[0]}: ')}")
    return done
