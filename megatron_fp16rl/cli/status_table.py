"""How `fp16rl status` shows runs: one in rows, several in a table, changes in lines."""

import math
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from launch.status import Status

_COLUMNS = ("state", "step", "reward", "held out", "scale", "skipped", "tokens/s", "left", "")


def of_all(runs: list["Status"]) -> Table:
    """A row a run."""
    table = Table("run", *_COLUMNS)
    for status in runs:
        table.add_row(status.run, *_cells(status))
    return table


def of_one(status: "Status") -> Table:
    """Rows of a name and a value."""
    rows: list[tuple[str, str | None]] = [("run", status.folder)]
    rows += zip(_COLUMNS[:-1], _cells(status), strict=False)
    rows += [("why", status.reason), ("likely cause", status.last_error)]
    rows.append(("launcher", status.launcher))
    for number, job in status.jobs.items():
        where = f"on {job.nodes}, {job.left} left" if job.nodes else job.reason
        rows.append(("job", f"{number} {job.state} {where}"))
    rows.append(("Slurm", status.slurm_error))
    rows += [("damaged", fault) for fault in status.faults]
    rows += [("attempts", str(status.attempts)), *(("cause", cause) for cause in status.causes)]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value:
            table.add_row(name, value)
    return table


def line(status: "Status") -> str:
    """A run in one line."""
    cells = zip(_COLUMNS, _cells(status), strict=True)
    return " | ".join([status.run, *(f"{name} {cell}" for name, cell in cells if cell)])


def _cells(status: "Status") -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        status.state,
        f"{status.steps_done}/{status.steps}",
        number(status.reward, ".3f"),
        number(status.accuracy, ".3f"),
        f"2^{math.log2(status.loss_scale):g}" if status.loss_scale else "",
        number(status.skipped, "d"),
        number(status.tokens_per_s, ",.0f"),
        "" if status.left_s is None else f"{status.left_s / 60:.1f} min",
        _note(status),
    ]


def _note(status: "Status") -> str:
    """What else is worth a glance, in a line."""
    jobs = [
        f"job {number} {job.state}" + (f" ({job.reason})" if job.reason not in ("", "None") else "")
        for number, job in status.jobs.items()
    ]
    restarts = [f"{len(status.causes)} restart(s)"] if status.causes else []
    end = "" if status.jobs or status.launcher else status.reason or status.last_error or ""
    silent = [f"Slurm is silent: {status.slurm_error}"] if status.slurm_error else []
    texts = (*status.faults, *jobs, *silent, *restarts, end)
    return "; ".join(text.splitlines()[0] for text in texts if text)
