"""Files of a run directory through which ranks, servers and their supervisor share the state of the run.

recipe.yaml         resolved; of a job that does not train instead: command, of fp16rl, word by word
private/outcome     first line: done, stopped, failed or died; then the reason. Absent while ranks work
private/stop        asks the learner to save after its step, and to end
private/cancelled   the job of a run that stopped does not go back into the queue
private/servers/    the rollout servers that are healthy; see megatron_fp16rl/rollout/discovery.py
logs/attempt_K/     of the K-th start of the ranks: their logs, its recipe; see launch/cause.py

Standard library and Python 3.9 only: see launch/supervisor.py.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.utils.files import Unreadable, write_text

RECIPE_FILE, SERVERS = "recipe.yaml", "private/servers"
COMMAND = "command"
OUTCOME, STOP, CANCELLED = "private/outcome", "private/stop", "private/cancelled"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
DIED = "died"  # no rank wrote how the run ended
_ATTEMPT = re.compile(r"attempt_([0-9]+)")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `word` is done, stopped, failed or died."""

    word: str
    reason: str = ""


def write(folder: Path, word: str, reason: str = "") -> None:
    """Records how a run ended. The last write counts."""
    write_text(folder / OUTCOME, f"{word}\n{reason}\n", mode=0o600)


def read(folder: Path) -> Outcome | None:
    """How a run ended, or None if its ranks died or are at work. Raises Unreadable."""
    file = folder / OUTCOME
    if not file.exists():
        return None
    word, _, reason = file.read_text(errors="replace").partition("\n")
    if word not in (DONE, STOPPED, FAILED, DIED):
        raise Unreadable(
            f"{file} says neither done, stopped nor failed, but {word[:40]!r}: remove it"
        )
    return Outcome(word, reason.strip())


def ask_to_stop(folder: Path) -> None:
    """Asks the run to save at the end of its step, and to end."""
    (folder / STOP).parent.mkdir(mode=0o700, exist_ok=True)
    (folder / STOP).touch(mode=0o600)


def is_asked_to_stop(folder: Path) -> bool:
    """Whether `ask_to_stop` was called."""
    return (folder / STOP).exists()


def clear(folder: Path) -> None:
    """Removes an earlier outcome and earlier requests to stop or to cancel."""
    for name in (OUTCOME, STOP, CANCELLED):
        (folder / name).unlink(missing_ok=True)


def begin_attempt(folder: Path) -> Path:
    """Removes the outcome, and makes the folder for the logs of the next start of the ranks."""
    (folder / OUTCOME).unlink(missing_ok=True)
    logs = _attempt(folder, max(_numbers(folder), default=-1) + 1)
    logs.mkdir(parents=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(folder / RECIPE_FILE, logs / RECIPE_FILE)
    return logs


def attempt(folder: Path) -> Path:
    """The folder of the last `begin_attempt`, or the first if there was none."""
    logs = _attempt(folder, max(_numbers(folder), default=0))
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def attempts(folder: Path) -> list[Path]:
    """The folders of all starts whose logs are there, in order."""
    return [_attempt(folder, number) for number in sorted(_numbers(folder))]


def recipe_remedy(folder: Path) -> str:
    """For an error: where the recipe of the last start is; empty if it is nowhere."""
    copies = [logs / RECIPE_FILE for logs in reversed(attempts(folder))]
    return next((f"; as it was last started: {copy}" for copy in copies if copy.is_file()), "")


def _attempt(folder: Path, number: int) -> Path:
    return folder / "logs" / f"attempt_{number}"


def _numbers(folder: Path) -> list[int]:
    """Of the starts whose logs are there. People remove old ones, or copy some under other names."""
    names = [_ATTEMPT.fullmatch(logs.name) for logs in (folder / "logs").glob("attempt_*")]
    return [int(name[1]) for name in names if name]
