"""How runs end, in files that ranks write and launchers read, those in bash too.

private/outcome     first line: done, stopped or failed; then why. Absent: its ranks died
private/stop        asks the learner to save at the end of its step and to leave
private/cancelled   what stopped is not to go back into the queue
logs/attempt_K/     of the K-th start of the ranks: their logs, and see launch/cause.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.files import write_text

OUTCOME, STOP, CANCELLED = "private/outcome", "private/stop", "private/cancelled"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
_SECRET = 0o600


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `word` is done, stopped or failed."""

    word: str
    reason: str = ""


def write(folder: Path, word: str, reason: str = "") -> None:
    """Says how a run ended. The last word counts."""
    write_text(folder / OUTCOME, f"{word}\n{reason}\n", _SECRET)


def read(folder: Path) -> Outcome | None:
    """How a run ended, or None if its ranks died or are at work."""
    file = folder / OUTCOME
    if not file.exists():
        return None
    word, _, reason = file.read_text().partition("\n")
    return Outcome(word, reason.strip())


def ask_to_stop(folder: Path) -> None:
    """The run is to save at the end of its step, and to leave."""
    (folder / STOP).touch(_SECRET)


def is_asked_to_stop(folder: Path) -> bool:
    """Whether somebody did."""
    return (folder / STOP).exists()


def clear(folder: Path) -> None:
    """Forgets an earlier outcome and an earlier wish to stop or to cancel."""
    for name in (OUTCOME, STOP, CANCELLED):
        (folder / name).unlink(missing_ok=True)


def begin_attempt(folder: Path) -> Path:
    """Forgets how the run ended, and makes the folder of the logs of another start of its ranks."""
    (folder / OUTCOME).unlink(missing_ok=True)
    logs = folder / "logs" / f"attempt_{len(_attempts(folder))}"
    logs.mkdir(parents=True)
    return logs


def attempt(folder: Path) -> Path:
    """The folder of the last `begin_attempt`, or the first if there was none."""
    logs = max(_attempts(folder), key=_number, default=folder / "logs" / "attempt_0")
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def _attempts(folder: Path) -> list[Path]:
    return list((folder / "logs").glob("attempt_*"))


def _number(logs: Path) -> int:
    return int(logs.name.removeprefix("attempt_"))
