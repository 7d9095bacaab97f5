"""The state of runs, from their directories and from Slurm; and how to end them."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import lock, outcome, slurm, sweep
from launch.cause import CAUSE_FILE, rank_log
from launch.lock import Owner
from launch.outcome import COMMAND, RECIPE_FILE
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.notation import read_file
from megatron_fp16rl.utils.errors import ExplainedError, FinalError
from megatron_fp16rl.utils.files import Unreadable, read_json
from megatron_fp16rl.utils.processes import tail

RUNNING, QUEUED, NEW = "running", "queued", "not started"
UNKNOWN, CANCELLED = "unknown", "cancelled"
_OVER = (outcome.DONE, outcome.STOPPED, outcome.FAILED, outcome.DIED, CANCELLED)
_RECENT = 10  # steps that say how fast a run is
_TREND = 100  # steps
_TRENDS = ("reward/mean", "mismatch/logprob_abs_mean", "fp16/loss_scale")


@dataclass
class Status:
    """The state of a run, or of a job that only runs a command. What is not known (yet) is None."""

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
    trends: dict[str, list[float]] = field(default_factory=dict)  # metrics of the last steps
    shares: dict[str, float] = field(default_factory=dict)  # of a step's time, lately
    servers_up: int | None = None  # of a run that runs
    servers: int | None = None
    attempts: int = 0
    causes: list[str] = field(default_factory=list)  # of attempts that failed
    last_error: str | None = None  # the likely cause of its end
    faults: list[str] = field(default_factory=list)  # damaged files of its directory
    slurm_error: str | None = None  # why Slurm did not answer about its jobs

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen by itself."""
        if self.slurm_error is not None:  # a job may be about to go on
            return self.state in (outcome.DONE, outcome.FAILED)
        return self.state in _OVER


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory, maybe one that cannot be read or has lost a file."""
    return any(
        os.path.lexists(folder / name) for name in (RECIPE_FILE, COMMAND, lock.LOCK_FILE)
    ) or (folder.is_dir() and not _is_readable(folder))


def _is_readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=True)


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the runs of a sweep."""
    return os.path.lexists(folder / sweep.AXES)


def all_runs(root: Path) -> list[Path]:
    """A run, or all runs in a folder and in its sweeps; oldest first."""
    if is_run(root):
        return [root]
    inner = sorted((f for f in root.glob("*") if f.is_dir()), key=lambda f: f.stat().st_mtime)
    return [run for f in inner if is_run(f) or is_sweep(f) for run in all_runs(f)]


def find(name: str, root: Path) -> Path:
    """The directory of a run or a sweep, by its path, its name in `root`, or a job's number.

    Raises RecipeError, since that is wrong usage.
    """
    for folder in (Path(name), root / name) if name else ():  # "" would be here, and all of root
        if is_run(folder) or is_sweep(folder):
            return folder.resolve()
    for run in all_runs(root):
        with _noting([]):
            if name in slurm.jobs(run):
                return run.resolve()
    raise RecipeError(
        f"there is no run {name}, neither as a directory nor in {root}, nor by a job's number"
    )


def read(folders: Sequence[Path]) -> list[Status]:
    """The status of runs, from their directories alone where Slurm is not here or silent."""
    statuses = [Status(folder.name, str(folder)) for folder in folders]
    runs = list(zip(folders, statuses, strict=True))
    workers = [_workers(folder, status.faults) for folder, status in runs]
    known: dict[str, slurm.Job] = {}
    silent: str | None = None
    if answered := slurm.available():
        try:
            known = slurm.queue([job for jobs, _ in workers for job in jobs])
        except slurm.SlurmError as error:
            answered, silent = False, str(error)
    for (folder, status), (jobs, owner) in zip(runs, workers, strict=True):
        status.slurm_error = silent if jobs else None
        status.jobs = {job: known[job] for job in jobs if job in known and known[job].is_alive}
        last = known.get(jobs[-1]) if jobs else None
        _set_state(status, folder, owner, answered or not jobs)
        if status.state == outcome.DIED and not status.reason and last is not None:
            status.reason = f"job {jobs[-1]}: {last.state} ({last.reason})"
        _set_progress(status, folder)
    return statuses


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


@contextlib.contextmanager
def _noting(faults: list[str]) -> Iterator[None]:
    """Ends a block that a damaged file is in the way of, and adds a line to `faults`."""
    try:
        yield
    except FinalError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}")


def _workers(folder: Path, faults: list[str]) -> tuple[list[str], Owner | None]:
    """The numbers of a run's jobs, one that was given to sbatch by hand too; and who holds its lock."""
    jobs: list[str] = []
    owner = None
    with _noting(faults):
        jobs = slurm.jobs(folder)
    with _noting(faults):
        owner = lock.holder(folder)
    if owner and owner.job and owner.job not in jobs:
        jobs.append(owner.job)
    return jobs, owner


def _set_state(status: Status, folder: Path, owner: Owner | None, answered: bool) -> None:
    """Sets the state from the lock, the outcome and the jobs. answered: Slurm did, if the run has jobs."""
    ended = None
    attempts: list[Path] = []
    with _noting(status.faults):
        ended = outcome.read(folder)
    with _noting(status.faults):
        attempts = outcome.attempts(folder)
    if owner or any(not job.is_waiting for job in status.jobs.values()):
        status.state = RUNNING
    elif status.jobs:
        status.state = QUEUED
    elif ended:
        status.state, status.reason = ended.word, ended.reason
    elif os.path.lexists(folder / outcome.CANCELLED):
        status.state = CANCELLED
    elif _is_readable(folder) and answered:
        begun = attempts or any(os.path.lexists(folder / n) for n in (metrics.METRICS, slurm.JOBS))
        status.state = outcome.DIED if begun else NEW
    if owner and owner.job not in status.jobs:
        status.launcher = f"{owner.host} {owner.pid}" + (f" (job {owner.job})" if owner.job else "")
    status.attempts = len(attempts)
    _set_causes(status, folder, attempts)


def _set_causes(status: Status, folder: Path, attempts: Sequence[Path]) -> None:
    """Sets why attempts ended, and the likely cause of the end: that of the last attempt, else the last log line."""
    last_cause = None
    for logs in attempts:
        last_cause = None
        with _noting(status.faults):
            if (logs / CAUSE_FILE).exists():
                last_cause = read_json(logs / CAUSE_FILE).get("cause")
        status.causes += [f"{logs.name}: {last_cause}"] if last_cause else []
    if status.state not in (outcome.FAILED, outcome.DIED, UNKNOWN):
        return
    lines = [last_cause] if last_cause else []
    for log in (folder / "logs" / "slurm.out", *(rank_log(logs, 0) for logs in attempts[-1:])):
        with _noting(status.faults):
            lines += [line for line in [tail(log, 1)] if log.is_file() and line]
    status.last_error = lines[0][:500] if lines else None


def _plan(folder: Path) -> tuple[int, int | None]:
    """The steps and the servers of a run's recipe. Raises Unreadable, which also says where the recipe is."""
    file, remedy = folder / RECIPE_FILE, outcome.recipe_remedy(folder)
    try:
        values = read_file(file)
    except RecipeError as error:
        raise Unreadable(f"{error}{remedy}") from None
    trainer, rollout = (values.get(key) or {} for key in ("trainer", "rollout"))
    steps = trainer.get("steps") if isinstance(trainer, dict) else None
    if type(steps) is not int:
        raise Unreadable(f"{file} is no resolved recipe: trainer.steps is {steps!r:.40}{remedy}")
    servers = (
        rollout.get("servers") if isinstance(rollout, dict) and not rollout.get("replay") else 0
    )
    return steps, servers if type(servers) is int else None


def _set_progress(status: Status, folder: Path) -> None:
    if os.path.lexists(folder / COMMAND):
        return
    rows: list[metrics.Row] = []
    with _noting(status.faults):
        status.steps, status.servers = _plan(folder)
    if status.state == RUNNING:  # else what is registered there is left over
        status.servers_up = len(list((folder / outcome.SERVERS).glob("*.json")))
    with _noting(status.faults):
        read = metrics.read(folder)
        rows = read.rows
        status.faults += read.faults
    if not rows:
        return
    last, recent = rows[-1], rows[-_RECENT:]
    seconds = sum(row.get("time/step_s") or 0.0 for row in recent)
    status.steps_done = last["step"] + 1
    status.reward = last.get("reward/mean")
    status.accuracy = next(reversed(metrics.values(rows, "eval/accuracy")), None)
    status.loss_scale = last.get("fp16/loss_scale")
    status.skipped = last.get("fp16/skipped_total")
    if seconds:
        status.tokens_per_s = sum(row.get("tokens/step") or 0 for row in recent) / seconds
        status.shares = {
            part: sum(metrics.seconds(row, part) for row in recent) / seconds
            for part in metrics.PARTS
        }
    for key in _TRENDS:
        if values := metrics.values(rows[-_TREND:], key):
            status.trends[key] = values
    if status.state == RUNNING and status.steps is not None:
        status.left_s = (status.steps - status.steps_done) * seconds / len(recent)


def cancel(folder: Path, save: bool) -> list[str]:
    """Ends what works on a run, or on all runs of a sweep; returns a line about each.

    save: the run ends after its step, with a checkpoint. One that cannot be ended does not spare the
    others. Raises ExplainedError, which says what to do elsewhere.
    """
    done: list[str] = []
    refused: list[str] = []
    runs = all_runs(folder)
    for run in runs:
        try:
            if (owner := lock.holder(run)) is not None:
                done += _signal(run, owner, signal.SIGUSR1 if save else signal.SIGTERM)
        except (ExplainedError, OSError) as error:
            refused.append(f"{run}: {error}")
    if slurm.available():
        _cancel_jobs(runs, save, done, refused)
    if refused:
        raise ExplainedError("\n".join([*refused, *done]))
    return done


def _signal(run: Path, owner: Owner, number: signal.Signals) -> list[str]:
    """Signals the process that works on a run, unless that is a job's. Raises ExplainedError, OSError."""
    if owner.job is not None:
        if slurm.available():
            return []  # see _cancel_jobs
        raise ExplainedError(f"job {owner.job} has it; where Slurm is: scancel {owner.job}")
    if not owner.pid:
        raise ExplainedError(f"{owner} has it; to find it: fuser {run / lock.LOCK_FILE}")
    if owner.host != socket.gethostname():
        raise ExplainedError(f"it runs on {owner.host}; there: kill -{number.name[3:]} {owner.pid}")
    os.kill(owner.pid, number)
    return [f"{number.name} to process {owner.pid}, which runs {run}"]


def _cancel_jobs(runs: Sequence[Path], save: bool, done: list[str], refused: list[str]) -> None:
    """Adds a line about each job to `done` or `refused`. Raises SlurmError."""
    jobs = {run: _workers(run, [])[0] for run in runs}
    known = slurm.queue([job for numbers in jobs.values() for job in numbers])
    alive = {job: state for job, state in known.items() if state.is_alive}
    for run, numbers in jobs.items():
        if alive.keys() & set(numbers):  # a run that saves does not go back into the queue
            (run / "private").mkdir(mode=0o700, exist_ok=True)
            (run / outcome.CANCELLED).touch()
    # Jobs that wait come first: one might start when another ends.
    for job, state in sorted(alive.items(), key=lambda item: not item[1].is_waiting):
        saves = save and not state.is_waiting
        try:
            slurm.ask_to_save(job) if saves else slurm.cancel(job)
        except slurm.SlurmError as error:
            refused.append(f"job {job}: {error}")
        else:
            done.append(f"job {job} " + ("is to save and end" if saves else "is cancelled"))
