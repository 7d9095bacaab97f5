"""What became of runs, told from their directories and from Slurm."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from launch import lock, outcome, slurm, sweep
from launch.lock import Owner
from launch.rank import RECIPE_FILE
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import METRICS
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.notation import read_file
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import Unreadable, read_json

RUNNING, QUEUED, NEW, UNKNOWN = "running", "queued", "not started", "unknown"
CANCELLED, DIED = "cancelled", "died"
_OVER = (outcome.DONE, outcome.STOPPED, outcome.FAILED, CANCELLED, DIED)
_TAIL_BYTES = 1 << 20
_RECENT = 10  # rows that say how fast a run is
_ERROR = re.compile(
    r"^(?:\[?rank\d+\]?:? ?|(?:slurmstepd|srun|scontrol)[\w-]*: )?"
    r"(?:[\w.]*(?:Error|Exception|NonFinite|Died)|error|fatal)\b.*"
)

T = TypeVar("T")


class NoSuchRun(RuntimeError):
    """Nothing has the name. The message says where it was looked for."""


class Elsewhere(RuntimeError):
    """A run's launcher is on another host. The message says what to do there."""


@dataclass
class Status:
    """A run at a glance. What is not known (yet) is None."""

    run: str
    folder: str
    state: str
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
    faults: list[str] = field(default_factory=list)  # what of its directory is damaged, by file
    slurm_error: str | None = (
        None  # why Slurm said nothing of its jobs: the rest is from its directory
    )

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen by itself."""
        if self.slurm_error is not None:  # a job may be about to go on
            return self.state in (outcome.DONE, outcome.FAILED)
        return self.state in _OVER

    @property
    def workers(self) -> list[str]:
        """Who works on it, or waits to."""
        found = [f"job {job} ({state.state})" for job, state in self.jobs.items()]
        return found + ([f"process {self.launcher}"] if self.launcher else [])


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory: one that cannot be looked into, or has lost a file, too."""
    return any(map(os.path.lexists, (folder / RECIPE_FILE, folder / lock.LOCK_FILE))) or (
        folder.is_dir() and not _may_look(folder)
    )


def _may_look(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=True)


def all_runs(root: Path) -> list[Path]:
    """The runs in a folder, those of sweeps too, and the runs of a sweep; oldest first."""
    if is_run(root):
        return [root]
    if found := sweep.runs(root):
        return [run for run in found if is_run(run)]
    folders = sorted(root.iterdir(), key=_age) if root.is_dir() else []
    return [run for f in folders if is_run(f) or sweep.runs(f) for run in all_runs(f)]


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0  # a link that leads nowhere


def find(name: str, root: Path) -> Path:
    """The directory of a run or a sweep, by its path, its name in `root`, or a job's number.

    Raises NoSuchRun.
    """
    for folder in (Path(name), root / name):
        if is_run(folder) or sweep.runs(folder):
            return folder.resolve()
    if not slurm.is_number(name):
        raise NoSuchRun(f"there is no run {name}, neither as a directory nor in {root}")
    number = name
    known = _submitted(root)
    if number not in known and slurm.available():
        asked = slurm.details(number)
        if "ArrayTaskId" in asked:  # a task of an array has a number of its own besides
            number = slurm.task(asked["ArrayJobId"], int(asked["ArrayTaskId"]))
        script = Path(asked.get("Command", ""))
        if number not in known and script.name == slurm.SCRIPT:
            return script.parent
    if number not in known:
        raise NoSuchRun(f"no run in {root} was job {name}, and Slurm does not know it as one")
    return known[number]


def _submitted(root: Path) -> dict[str, Path]:
    """Runs and sweeps by the numbers of their jobs."""
    folders = [file.parent for file in root.glob(f"*/{slurm.JOBS}")]
    folders += [run for folder in folders for run in sweep.runs(folder)]
    known = {job: folder.resolve() for folder in folders for job in slurm.jobs(folder)}
    # A number may be given without its cluster.
    return {job.partition(";")[0]: folder for job, folder in known.items()} | known


def read(folders: Sequence[Path]) -> list[Status]:
    """What became of runs, told from their directories alone where Slurm is not here or silent."""
    wanted = [job for folder in folders for job in _part([], lambda f=folder: _jobs(f), [])]
    if not slurm.available():
        return [_read(folder, {}, dict.fromkeys(wanted)) for folder in folders]
    known, unheard = slurm.queue(wanted)
    return [_read(folder, known, unheard) for folder in folders]


def _part(faults: list[str], look: Callable[[], T], otherwise: T) -> T:
    """What a look into a run's directory tells; if a file there is damaged, that is added to `faults`."""
    try:
        return look()
    except FinalError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}")
    return otherwise


def _jobs(folder: Path) -> list[str]:
    """Numbers of the jobs of a run: those that were submitted, and one that sbatch got by hand."""
    recorded, owner = slurm.jobs(folder), lock.holder(folder)
    if owner is None or owner.job is None or owner.job in (j.partition(";")[0] for j in recorded):
        return recorded
    return [*recorded, owner.job]


def check_free(status: Status) -> None:
    """Raises RunInUse if somebody works on a run, or a job waits to."""
    if status.workers:
        raise lock.RunInUse(
            f"{', '.join(status.workers)} has {status.folder} already; to end it with a checkpoint: "
            f"fp16rl cancel {status.folder} --save"
        )


def follow(folders: Sequence[Path], every_s: float) -> Iterator[list[Status]]:
    """`read` again and again, until all are over."""
    while True:
        found = read(folders)
        yield found
        if all(status.is_over for status in found):
            return
        time.sleep(every_s)


def _read(folder: Path, known: dict[str, slurm.Job], unheard: Mapping[str, str | None]) -> Status:
    """known, unheard: as `slurm.queue` has them; no reason where there is no Slurm to ask."""
    faults: list[str] = []
    mine = _part(faults, lambda: _jobs(folder), [])
    jobs = {job: known[job] for job in mine if job in known and known[job].is_alive}
    silent = [job for job in mine if job in unheard]
    holder = _part([], lambda: lock.holder(folder), None)
    ended = _part(faults, lambda: outcome.read(folder), None)
    attempts = _part(faults, lambda: outcome.attempts(folder), [])
    begun = os.path.lexists(folder / METRICS) or bool(attempts)
    if holder or any(not job.is_waiting for job in jobs.values()):
        state = RUNNING
    elif jobs:
        state = QUEUED
    elif ended:
        state = ended.word
    elif os.path.lexists(folder / outcome.CANCELLED):
        state = CANCELLED
    elif silent or not _may_look(folder):
        state = UNKNOWN  # its cluster is elsewhere, or silent
    else:
        state = DIED if begun or mine else NEW
    status = Status(folder.name, str(folder), state, jobs=jobs, faults=faults)
    status.launcher = _launcher(holder) if holder and holder.job not in jobs else None
    status.slurm_error = next((why for job in silent if (why := unheard[job])), None)
    if ended and not status.jobs:
        status.reason = ended.reason
    elif state == DIED and (last := known.get(mine[-1]) if mine else None):
        status.reason = f"job {mine[-1]}: {last.state} ({last.reason})"
    status.steps = _part(faults, lambda: _steps(folder), None)
    found = _part(faults, lambda: metrics.read(folder, _TAIL_BYTES), None)
    if found is not None:
        faults += found.faults
        _add_progress(status, found.rows)
    status.attempts = len(attempts)
    causes = [_part(faults, lambda at=logs: _cause(at), None) for logs in attempts]
    status.causes = [cause for cause in causes if cause]
    if state != outcome.DONE:
        status.last_error = _part(faults, lambda: _last_error(attempts, folder), None)
    return status


def _launcher(owner: Owner) -> str:
    job = f" (job {owner.job})" if owner.job else ""
    return f"{owner.host} {owner.pid}{job}"


def _steps(folder: Path) -> int:
    """How many steps a run is to have. Raises Unreadable, which says where its recipe is, too."""
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


def _cause(logs: Path) -> str | None:
    """Why an attempt ended before its time."""
    file = logs / "cause.json"
    if not file.exists():
        return None
    return f"{logs.name}: {read_json(file).get('cause')}"


def _last_error(attempts: Sequence[Path], folder: Path) -> str | None:
    """The last line of the newest logs that looks like an error; else the job's last word."""
    output = folder / "logs" / "slurm.out"
    newest = sorted(attempts[-1].glob("rank_*.log")) if attempts else []
    for log in (*newest, output):
        for line in reversed(_last_lines(log)):
            if _ERROR.match(line):
                return line[:500]
    return next((line[:500] for line in reversed(_last_lines(output)) if line.strip()), None)


def _last_lines(log: Path) -> list[str]:
    if not log.exists():
        return []
    with log.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return opened.read().decode(errors="replace").splitlines()


def cancel(folder: Path, save: bool) -> list[str]:
    """Ends what works on a run, or on all runs of a sweep; says what was told whom.

    save: the run is to end after its step, with a checkpoint. Raises Elsewhere, SlurmError.
    """
    done, refused = [], []
    for run in all_runs(folder):
        try:
            if (owner := lock.holder(run)) is not None:
                done += _end(run, owner, signal.SIGUSR1 if save else signal.SIGTERM)
        except (Elsewhere, OSError) as error:  # the others are to end all the same
            refused.append(f"{run}: {error}")
    if slurm.available():
        done += _cancel_jobs(folder, save)
    if refused:
        raise Elsewhere("\n".join([*refused, *done]))
    return done


def _end(run: Path, owner: Owner, number: signal.Signals) -> list[str]:
    """Signals who works on a run, unless that is a job; says what was done. Raises Elsewhere, OSError."""
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


def _cancel_jobs(folder: Path, save: bool) -> list[str]:
    runs = all_runs(folder)
    known, unheard = slurm.queue([j for run in runs for j in _part([], lambda r=run: _jobs(r), [])])
    alive = {job: state for job, state in known.items() if state.is_alive}
    for run in runs:
        if alive.keys() & set(
            _part([], lambda r=run: _jobs(r), [])
        ):  # what saves is not to go back into the queue
            (run / "private").mkdir(mode=0o700, exist_ok=True)
            (run / outcome.CANCELLED).touch()
    done, refused = [], [f"job {job}: {why}" for job, why in unheard.items()]
    # Those that wait come first: one of them might start when another ends.
    for job, state in sorted(alive.items(), key=lambda item: not item[1].is_waiting):
        saves = save and not state.is_waiting
        try:
            slurm.ask_to_save(job) if saves else slurm.cancel(job)
        except slurm.SlurmError as error:  # the others are to end all the same
            refused.append(f"job {job}: {error}")
        else:
            done.append(f"job {job} " + ("is to save and end" if saves else "is cancelled"))
    if refused:
        raise slurm.SlurmError("\n".join([*refused, *done]))
    return done
