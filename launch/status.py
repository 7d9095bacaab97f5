"""What became of runs, told from their directories and from Slurm."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import local, outcome, slurm, sweep
from launch.rank import RECIPE_FILE
from megatron_fp16rl.recipe.notation import read_file
from megatron_fp16rl.run import METRICS

RUNNING, QUEUED, NEW, UNKNOWN = "running", "queued", "not started", "unknown"
CANCELLED, DIED = "cancelled", "died"
_OVER = (outcome.DONE, outcome.STOPPED, outcome.FAILED, CANCELLED, DIED)
_TAIL_BYTES = 1 << 20
_RECENT = 10  # rows that say how fast a run is
_ERROR = re.compile(
    r"^(?:\[?rank\d+\]?:? ?|(?:slurmstepd|srun|scontrol)[\w-]*: )?"
    r"(?:[\w.]*(?:Error|Exception|NonFinite|Died)|error|fatal)\b.*"
)


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
    slurm_error: str | None = (
        None  # why Slurm said nothing of its jobs: the rest is from its directory
    )

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen by itself."""
        if self.slurm_error is not None:  # a job may be about to go on
            return self.state in (outcome.DONE, outcome.FAILED)
        return self.state in _OVER


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory."""
    return (folder / RECIPE_FILE).is_file()


def all_runs(root: Path) -> list[Path]:
    """The runs in a folder, those of sweeps too, and the runs of a sweep; oldest first."""
    if is_run(root):
        return [root]
    if found := sweep.runs(root):
        return [run for run in found if is_run(run)]
    folders = [f for f in root.iterdir() if f.is_dir()] if root.is_dir() else []
    folders.sort(key=lambda f: f.stat().st_mtime)
    return [run for f in folders if is_run(f) or sweep.runs(f) for run in all_runs(f)]


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
    wanted = [job for folder in folders for job in slurm.jobs(folder)]
    if not slurm.available():
        return [_read(folder, {}, dict.fromkeys(wanted)) for folder in folders]
    known, unheard = slurm.queue(wanted)
    return [_read(folder, known, unheard) for folder in folders]


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
    mine = slurm.jobs(folder)
    jobs = {job: known[job] for job in mine if job in known and known[job].is_alive}
    silent = [job for job in mine if job in unheard]
    holder, ended = local.holder(folder), outcome.read(folder)
    begun = (folder / METRICS).exists() or any((folder / "logs").glob("attempt_*"))
    if holder or any(not job.is_waiting for job in jobs.values()):
        state = RUNNING
    elif jobs:
        state = QUEUED
    elif ended:
        state = ended.word
    elif (folder / outcome.CANCELLED).exists():
        state = CANCELLED
    elif silent:
        state = UNKNOWN  # its cluster is elsewhere, or silent
    else:
        state = DIED if begun or mine else NEW
    status = Status(folder.name, str(folder), state, jobs=jobs)
    status.launcher = f"{holder[0]} {holder[1]}" if holder else None
    status.slurm_error = next((why for job in silent if (why := unheard[job])), None)
    if ended and not status.jobs:
        status.reason = ended.reason
    elif state == DIED and (last := known.get(mine[-1]) if mine else None):
        status.reason = f"job {mine[-1]}: {last.state} ({last.reason})"
    trainer = read_file(folder / RECIPE_FILE).get("trainer")
    status.steps = trainer.get("steps") if isinstance(trainer, dict) else None
    _add_progress(status, folder)
    attempts = sorted((folder / "logs").glob("attempt_*"), key=lambda f: int(f.name[8:]))
    status.attempts = len(attempts)
    status.causes = [text for logs in attempts if (text := _cause(logs))]
    if state != outcome.DONE:
        status.last_error = _last_error(attempts, folder)
    return status


def _add_progress(status: Status, folder: Path) -> None:
    rows = _last_rows(folder / METRICS)
    if not rows:
        return
    last, recent = rows[-1], rows[-_RECENT:]
    seconds = sum(row["time/step_s"] for row in recent)
    status.steps_done = last["step"] + 1
    status.reward = last.get("reward/mean")
    accuracies = [a for row in rows if (a := row.get("eval/accuracy")) is not None]
    status.accuracy = accuracies[-1] if accuracies else None
    status.loss_scale = last.get("fp16/loss_scale")
    status.skipped = last.get("fp16/skipped_total")
    if seconds:
        status.tokens_per_s = sum(row.get("tokens/step", 0) for row in recent) / seconds
    if status.state == RUNNING and status.steps is not None:
        status.left_s = (status.steps - status.steps_done) * seconds / len(recent)


def _last_rows(file: Path) -> list[dict]:
    """The last rows of a file of metrics, which is read from its end: it may be long."""
    if not file.exists():
        return []
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _TAIL_BYTES))
        lines = opened.read().splitlines(keepends=True)
    whole = lines if size <= _TAIL_BYTES else lines[1:]
    return [json.loads(line) for line in whole if line.endswith(b"\n")]


def _cause(logs: Path) -> str | None:
    """Why an attempt ended before its time."""
    file = logs / "cause.json"
    if not file.exists():
        return None
    return f"{logs.name}: {json.loads(file.read_text())['cause']}"


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
    done = []
    for run in all_runs(folder):
        if holder := local.holder(run):
            done.append(_signal(run, *holder, signal.SIGUSR1 if save else signal.SIGTERM))
    if slurm.available():
        done += _cancel_jobs(folder, save)
    return done


def _signal(run: Path, host: str, pid: int, number: signal.Signals) -> str:
    if host != socket.gethostname():
        raise Elsewhere(f"{run} runs on {host}; there: kill -{number.name[3:]} {pid}")
    os.kill(pid, number)
    return f"{number.name} to process {pid}, which runs {run}"


def _cancel_jobs(folder: Path, save: bool) -> list[str]:
    runs = all_runs(folder)
    known, unheard = slurm.queue([job for run in runs for job in slurm.jobs(run)])
    alive = {job: state for job, state in known.items() if state.is_alive}
    for run in runs:
        if alive.keys() & set(slurm.jobs(run)):  # what saves is not to go back into the queue
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
