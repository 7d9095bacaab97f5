"""How a run ended, and how to ask it to end: files that any launcher can read, bash included.

private/outcome: the first line is done, stopped or failed, the rest is why. Absent: the ranks died,
and may be started again. private/stop: asks the ranks to save after their step, and to leave.
private/cancelled: what stopped is not to go back into the queue.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.files import write_text

OUTCOME, STOP, CANCELLED = "private/outcome", "private/stop", "private/cancelled"
DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True)
class Outcome:
    """word: DONE, STOPPED or FAILED; reason: for people."""

    word: str
    reason: str = ""


def write(folder: Path, word: str, reason: str = "") -> None:
    """Says how the run in `folder` ended."""
    write_text(folder / OUTCOME, f"{word}\n{reason}\n")


def read(folder: Path) -> Outcome | None:
    """What `write` said; None if nothing did."""
    try:
        word, _, reason = (folder / OUTCOME).read_text().partition("\n")
    except FileNotFoundError:
        return None
    return Outcome(word, reason.strip())


def clear(folder: Path) -> None:
    """Forgets an earlier outcome and an earlier wish to stop."""
    for name in (OUTCOME, STOP):
        (folder / name).unlink(missing_ok=True)


def ask_to_stop(folder: Path) -> None:
    """The run is to save at the end of its step, and to leave."""
    (folder / STOP).touch()


def is_asked_to_stop(folder: Path) -> bool:
    """Whether somebody did."""
    return (folder / STOP).exists()
