"""How runs fare, told by their directories and by Slurm; and how to end them."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch import batch_script, lock, outcome, slurm, sweep
from launch.lock import Owner
from launch.outcome import RECIPE_FILE
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.notation import read_file
from megatron_fp16rl.utils.errors import ExplainedError, FinalError
from megatron_fp16rl.utils.files import Unreadable, read_json

RUNNING, QUEUED, NEW, UNKNOWN, CANCELLED = (
    "running",
    "queued",
    "not started",
    "unknown",
    "cancelled",
)
_OVER = (outcome.DONE, outcome.STOPPED, outcome.FAILED, outcome.DIED, CANCELLED)
_TAIL_BYTES = 1 << 20
_RECENT = 10  # steps that say how fast a run is
_ERROR = re.compile(
    r"^(?:\[?rank\d+\]?:? ?|(?:slurmstepd|srun|scontrol)[\w-]*: )?"
    r"(?:[\w.]*(?:Error|Exception|NonFinite|Died)|error|fatal)\b.*"
)


class NoSuchRun(RecipeError):
    """Nothing has the name. The message says where it was looked for. Wrong usage: exit code 2."""


class Elsewhere(ExplainedError):
    """A run's launcher is on another host. The message says what to do there."""


@dataclass
class Status:
    """A run at a glance. What is not known (yet) is None."""

    run: str
    folder: str
    state: str = UNKNOWN
    reason: str = ""  # of the end
    jobs: dict[str, slurm.Job] = field(default_factory=dict)  # those that wait or run
    launcher: str | None = None  # host and process id, of a run that is no job
    steps_done: int = 0
    steps: int | None = None
    reward: float | None = None
    accuracy: float | None = None  # held out
    loss_scale: float | None = None
    skipped: int | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    attempts: int = 0
    causes: list[str] = field(default_factory=list)  # of attempts that ended before their time
    last_error: str | None = None
    faults: list[str] = field(default_factory=list)  # damaged files of its directory
    slurm_error: str | None = None  # why Slurm said nothing of its jobs

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen by itself."""
        if self.slurm_error is not None:  # a job may be about to go on
            return self.state in (outcome.DONE, outcome.FAILED)
        return self.state in _OVER


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory, maybe one that cannot be read or has lost a file."""
    return any(os.path.lexists(folder / name) for name in (RECIPE_FILE, lock.LOCK_FILE)) or (
        folder.is_dir() and not _is_readable(folder)
    )


def _is_readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=True)


def all_runs(root: Path) -> list[Path]:
    """The runs in a folder, those of sweeps too, and the runs of a sweep; oldest first."""
    if is_run(root):
        return [root]
    if runs := sweep.runs(root):
        return [run for run in runs if is_run(run)]
    folders = sorted(root.iterdir(), key=_age) if root.is_dir() else []
    return [run for f in folders if is_run(f) or sweep.runs(f) for run in all_runs(f)]


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0  # a dangling link


def find(name: str, root: Path) -> Path:
    """The directory of a run or a sweep, by its path, its name in `root`, or a job's number.

    Raises NoSuchRun.
    """
    for folder in (Path(name), root / name):
        if is_run(folder) or sweep.runs(folder):
            return folder.resolve()
    if not slurm.is_number(name):
        raise NoSuchRun(f"there is no run {name}, neither as a directory nor in {root}")
    folders = [file.parent for file in root.glob(f"*/{slurm.JOBS}")]
    folders += [run for folder in folders for run in sweep.runs(folder)]
    submitted = {job: folder for folder in folders for job in slurm.jobs(folder)}
    # A number may be given without its cluster.
    submitted = {job.partition(";")[0]: folder for job, folder in submitted.items()} | submitted
    number = name
    if number not in submitted and slurm.available():
        details = slurm.details(number)
        if "ArrayTaskId" in details:  # a task of an array has a number of its own besides
            number = slurm.task(details["ArrayJobId"], int(details["ArrayTaskId"]))
        script = Path(details.get("Command", ""))
        if number not in submitted and script.name == batch_script.SCRIPT:
            return script.parent
    if number not in submitted:
        raise NoSuchRun(f"no run in {root} was job {name}, and Slurm does not know it as one")
    return submitted[number].resolve()


def read(folders: Sequence[Path]) -> list[Status]:
    """The status of runs, from their directories alone where Slurm is not here or silent."""
    jobs = [job for folder in folders for job in _jobs(folder, [])]
    if not slurm.available():
        return [_read(folder, {}, dict.fromkeys(jobs)) for folder in folders]
    known, silent = slurm.queue(jobs)
    return [_read(folder, known, silent) for folder in folders]


def follow(folders: Sequence[Path], every_s: float) -> Iterator[list[Status]]:
    """`read` again and again, until all are over."""
    while True:
        statuses = read(folders)
        yield statuses
        if all(status.is_over for status in statuses):
            return
        time.sleep(every_s)


def check_free(status: Status) -> None:
    """Raises RunInUse if somebody works on a run, or a job waits to."""
    workers = [f"job {job} ({state.state})" for job, state in status.jobs.items()]
    workers += [f"process {status.launcher}"] if status.launcher else []
    if workers:
        raise lock.RunInUse(
            f"{', '.join(workers)} has {status.folder} already; to end it with a checkpoint: "
            f"fp16rl cancel {status.folder} --save"
        )


@contextmanager
def _collecting(faults: list[str]) -> Iterator[None]:
    """Adds a damaged file that the block meets to `faults`, and goes on after the block."""
    try:
        yield
    except FinalError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}")


def _jobs(folder: Path, faults: list[str]) -> list[str]:
    """Numbers of the jobs of a run: those submitted, and one that was given to sbatch by hand."""
    jobs: list[str] = []
    with _collecting(faults):
        jobs = slurm.jobs(folder)
        owner = lock.holder(folder)
        if owner and owner.job and owner.job not in [job.partition(";")[0] for job in jobs]:
            jobs.append(owner.job)
    return jobs


def _read(folder: Path, known: dict[str, slurm.Job], silent: Mapping[str, str | None]) -> Status:
    """known, silent: as `slurm.queue` has them; no reason where there is no Slurm to ask."""
    status = Status(folder.name, str(folder))
    faults, jobs = status.faults, _jobs(folder, status.faults)
    status.jobs = {job: known[job] for job in jobs if job in known and known[job].is_alive}
    owner = ended = None
    attempts: list[Path] = []
    with _collecting([]):  # `_jobs` has told it
        owner = lock.holder(folder)
    with _collecting(faults):
        ended = outcome.read(folder)
    with _collecting(faults):
        attempts = outcome.attempts(folder)
    if owner or any(not job.is_waiting for job in status.jobs.values()):
        status.state = RUNNING
    elif status.jobs:
        status.state = QUEUED
    elif ended:
        status.state = ended.word
    elif os.path.lexists(folder / outcome.CANCELLED):
        status.state = CANCELLED
    elif _is_readable(folder) and not any(job in silent for job in jobs):
        begun = os.path.lexists(folder / metrics.METRICS) or bool(attempts or jobs)
        status.state = outcome.DIED if begun else NEW
    if owner and owner.job not in status.jobs:
        status.launcher = f"{owner.host} {owner.pid}" + (f" (job {owner.job})" if owner.job else "")
    status.slurm_error = next((why for job in jobs if (why := silent.get(job))), None)
    if ended and not status.jobs:
        status.reason = ended.reason
    elif status.state == outcome.DIED and jobs and (last := known.get(jobs[-1])):
        status.reason = f"job {jobs[-1]}: {last.state} ({last.reason})"
    with _collecting(faults):
        status.steps = _steps(folder)
    with _collecting(faults):
        newest = metrics.read(folder)
        faults += newest.faults
        _add_progress(status, newest.rows)
    status.attempts = len(attempts)
    for logs in attempts:
        with _collecting(faults):
            if (logs / "cause.json").exists():
                status.causes.append(f"{logs.name}: {read_json(logs / 'cause.json').get('cause')}")
    if status.state != outcome.DONE:
        with _collecting(faults):
            status.last_error = _last_error(attempts, folder)
    return status


def _steps(folder: Path) -> int:
    """How many steps a run is to make. Raises Unreadable, which also says where its recipe is."""
    file = folder / RECIPE_FILE
    remedy = outcome.recipe_remedy(folder)
    try:
        trainer = read_file(file).get("trainer")
    except RecipeError as error:
        raise Unreadable(f"{error}{remedy}") from None
    steps = trainer.get("steps") if isinstance(trainer, dict) else None
    if type(steps) is not int:
        raise Unreadable(f"{file} is no resolved recipe: trainer.steps is {steps!r:.40}{remedy}")
    return steps


def _add_progress(status: Status, rows: Sequence[metrics.Row]) -> None:
    if not rows:
        return
    last, recent = rows[-1], rows[-_RECENT:]
    seconds = sum(row.get("time/step_s") or 0.0 for row in recent)
    status.steps_done = last["step"] + 1
    status.reward = last.get("reward/mean")
    accuracies = [a for row in rows if (a := row.get("eval/accuracy")) is not None]
    status.accuracy = accuracies[-1] if accuracies else None
    status.loss_scale = last.get("fp16/loss_scale")
    status.skipped = last.get("fp16/skipped_total")
    if seconds:
        status.tokens_per_s = sum(row.get("tokens/step") or 0 for row in recent) / seconds
    if status.state == RUNNING and status.steps is not None:
        status.left_s = (status.steps - status.steps_done) * seconds / len(recent)


def _last_error(attempts: Sequence[Path], folder: Path) -> str | None:
    """The last line of the newest logs that looks like an error; else the last line of the job."""
    output = _last_lines(folder / "logs" / "slurm.out")
    newest = sorted(attempts[-1].glob("rank_*.log")) if attempts else []
    for lines in (*map(_last_lines, newest), output):
        for line in reversed(lines):
            if _ERROR.match(line):
                return line[:500]
    return next((line[:500] for line in reversed(output) if line.strip()), None)


def _last_lines(log: Path) -> list[str]:
    if not log.exists():
        return []
    with log.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return opened.read().decode(errors="replace").splitlines()


def cancel(folder: Path, save: bool) -> list[str]:
    """Ends what works on a run, or on all runs of a sweep; returns a line about each.

    save: the run ends after its step, with a checkpoint. One that cannot be ended does not spare the
    others. Raises Elsewhere, SlurmError.
    """
    done, refused = [], []
    runs = all_runs(folder)
    for run in runs:
        try:
            if (owner := lock.holder(run)) is not None:
                done += _signal(run, owner, signal.SIGUSR1 if save else signal.SIGTERM)
        except (Elsewhere, OSError) as error:
            refused.append(f"{run}: {error}")
    if slurm.available():
        done += _cancel_jobs(runs, save)
    if refused:
        raise Elsewhere("\n".join([*refused, *done]))
    return done


def _signal(run: Path, owner: Owner, number: signal.Signals) -> list[str]:
    """Signals the process that works on a run, unless that is a job's. Raises Elsewhere, OSError."""
    if owner.job is not None:
        if slurm.available():
            return []  # see _cancel_jobs
        raise Elsewhere(f"job {owner.job} has it; where Slurm is: scancel {owner.job}")
    if not owner.pid:
        raise Elsewhere(f"{owner} has it; to find it: fuser {run / lock.LOCK_FILE}")
    if owner.host != socket.gethostname():
        raise Elsewhere(f"it runs on {owner.host}; there: kill -{number.name[3:]} {owner.pid}")
    os.kill(owner.pid, number)
    return [f"{number.name} to process {owner.pid}, which runs {run}"]


def _cancel_jobs(runs: Sequence[Path], save: bool) -> list[str]:
    jobs = {run: _jobs(run, []) for run in runs}
    known, silent = slurm.queue([job for numbers in jobs.values() for job in numbers])
    alive = {job: state for job, state in known.items() if state.is_alive}
    for run, numbers in jobs.items():
        if alive.keys() & set(numbers):  # a run that saves does not go back into the queue
            (run / "private").mkdir(mode=0o700, exist_ok=True)
            (run / outcome.CANCELLED).touch()
    done, refused = [], [f"job {job}: {why}" for job, why in silent.items()]
    # Jobs that wait come first: one might start when another ends.
    for job, state in sorted(alive.items(), key=lambda item: not item[1].is_waiting):
        saves = save and not state.is_waiting
        try:
            slurm.ask_to_save(job) if saves else slurm.cancel(job)
        except slurm.SlurmError as error:
            refused.append(f"job {job}: {error}")
        else:
            done.append(f"job {job} " + ("is to save and end" if saves else "is cancelled"))
    if refused:
        raise slurm.SlurmError("\n".join([*refused, *done]))
    return done
