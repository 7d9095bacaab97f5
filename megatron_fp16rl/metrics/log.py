"""The reader of metrics.jsonl: the steps of a run, one JSON object a line.

A kill may cut the last line, which is no fault. A full disk or a person may leave anything in the file;
one bad line does not affect the others.
"""

from __future__ import annotations  # for the host of a container: launch/supervisor.py

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp16rl.utils.files import Unreadable, parse_json

METRICS = "metrics.jsonl"
Row = dict[str, Any]  # "step", and metrics by name: numbers, None, or text
_NUMBERS = ("time/", "tokens/", "reward/", "mismatch/", "eval/", "fp16/loss_scale", "fp16/skipped")

# Parts of a step's wall time, and their metrics. Of rollouts it is what the learner waited: with
# rollout.ahead they take longer, time/rollout_s, while it learns.
PARTS = {
    "rollout": "time/rollout_wait_s",
    "score": "time/score_s",
    "update": "time/update_s",
    "sync": "time/sync_s",
}


@dataclass(frozen=True)
class Metrics:
    """A metrics file.

    rows      the steps, in the order of the file
    lines     the line of each row, as it stands there
    faults    messages about lines that are no steps, by file and line
    faulty    these lines
    """

    rows: list[Row]
    lines: list[bytes]
    faults: list[str]
    faulty: list[bytes]


def read(folder: Path) -> Metrics:
    """The metrics of a run directory; none if it has no step yet. Raises Unreadable."""
    file = folder / METRICS
    metrics = Metrics([], [], [], [])
    try:
        with file.open("rb") as opened:
            lines = opened.readlines()
    except FileNotFoundError:
        return metrics
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            metrics.rows.append(_row(line))
            metrics.lines.append(line if line.endswith(b"\n") else line + b"\n")
        except ValueError as error:
            if line.endswith(b"\n"):
                metrics.faults.append(f"{file}, line {number}, is no step: {error}")
                metrics.faulty.append(line)
    return metrics


def _row(line: bytes) -> Row:
    row = parse_json(line)
    if type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError('it has no "step"')
    for key, value in row.items():
        if isinstance(value, dict | list) or (isinstance(value, str) and key.startswith(_NUMBERS)):
            raise ValueError(f"{key} is no number: {str(value)[:40]!r}")
    return row


def values(rows: list[Row], key: str) -> list[Any]:
    """A metric of the steps that have it."""
    return [value for row in rows if (value := row.get(key)) is not None]


def seconds(row: Row, part: str) -> float:
    """The wall time of one of PARTS in a step. Runs of earlier versions have no time/rollout_wait_s."""
    value = row.get(PARTS[part])
    return (row.get(f"time/{part}_s") or 0.0) if value is None else value
