"""The reader of metrics.jsonl: the steps of a run, one JSON object a line.

A kill may cut the last line, which is no fault. A full disk or a person may leave anything in the file;
one bad line does not affect the others. Of a step that is there twice the later line counts: a run that goes
on repeats steps.
"""

from __future__ import annotations  # for the host of a container: launch/supervisor.py

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp16rl.utils.files import Unreadable, parse_json

METRICS = "metrics.jsonl"
Row = dict[str, Any]  # "step", and metrics by name: numbers, None, or text
_NUMBERS = ("time/", "tokens/", "reward/", "mismatch/", "eval/", "fp16/loss_scale", "fp16/skipped")
_LARGEST = 1e100  # of what is measured; sums of larger ones may be infinite

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
            row = _row(line)
            _drop_repeated(metrics, row["step"], f"{file}, line {number}")
            metrics.rows.append(row)
            metrics.lines.append(line if line.endswith(b"\n") else line + b"\n")
        except ValueError as error:
            if line.endswith(b"\n"):
                metrics.faults.append(f"{file}, line {number}, is no step: {error}")
                metrics.faulty.append(line)
    return metrics


def _drop_repeated(metrics: Metrics, step: int, where: str) -> None:
    """Takes back the steps from `step` on: the line at `where` begins them again."""
    count = len(metrics.rows)
    while count and metrics.rows[count - 1]["step"] >= step:
        count -= 1
    if count == len(metrics.rows):
        return
    first, last = metrics.rows[count]["step"], metrics.rows[-1]["step"]
    metrics.faults.append(
        f"{where}, is step {step} after step {last}: of steps {first} to {last} the lines before it do not count"
    )
    metrics.faulty.extend(metrics.lines[count:])
    del metrics.rows[count:], metrics.lines[count:]


def _row(line: bytes) -> Row:
    row = parse_json(line)
    if type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError('it has no "step"')
    for key, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, str) and not key.startswith(_NUMBERS):
            value.encode()  # half a character, which nothing can show, is a ValueError
        elif value is not None and not (is_number and abs(value) <= _LARGEST):
            raise ValueError(f"{key} is no number: {str(value)[:40]!r}")
        key.encode()
    return row


def values(rows: list[Row], key: str) -> list[Any]:
    """A metric of the steps that have it."""
    return [value for row in rows if (value := row.get(key)) is not None]


def seconds(row: Row, part: str) -> float:
    """The wall time of one of PARTS in a step. Runs of earlier versions have no time/rollout_wait_s."""
    value = row.get(PARTS[part])
    return (row.get(f"time/{part}_s") or 0.0) if value is None else value
