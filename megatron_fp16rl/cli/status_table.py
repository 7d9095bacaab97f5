"""How `fp16rl status` shows runs: one in rows, several in a table."""

import itertools
import math
from collections.abc import Sequence

from rich.table import Table

from launch.status import Status

_COLUMNS = ("state", "step", "reward", "held out", "scale", "skipped", "tokens/s", "left", "")
_BARS = "▁▂▃▄▅▆▇█"


def of(runs: Sequence[Status], one: bool) -> Table:
    """one: a single run was asked for, not a folder of runs that holds one."""
    return _of_one(runs[0]) if one else _of_all(runs)


def _of_all(runs: Sequence[Status]) -> Table:
    """A row a run."""
    table = Table("run", *_COLUMNS)
    for status in runs:
        table.add_row(status.run, *_cells(status))
    return table


def _of_one(status: Status) -> Table:
    """Rows of a name and a value."""
    rows: list[tuple[str, str | None]] = [("run", status.folder)]
    cells = dict(zip(_COLUMNS, _cells(status), strict=True))
    mismatch = status.trends.get("mismatch/logprob_abs_mean")
    cells["reward"] = _with_trend(cells["reward"], status, "reward/mean")
    cells["scale"] = _with_trend(cells["scale"], status, "fp16/loss_scale")
    rows += list(cells.items())[:-1]
    if mismatch:
        text = _with_trend(f"{mismatch[-1]:.1e}", status, "mismatch/logprob_abs_mean")
        rows.append(("mismatch", text))
    rows.append(("step's time", _percent(status.shares)))
    if status.servers_up is not None and status.servers:
        rows.append(("servers", f"{status.servers_up} of {status.servers} alive"))
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


def _with_trend(cell: str, status: Status, metric: str) -> str:
    """A value behind the curve of its last steps; the mismatch and the scale go over powers."""
    values = status.trends.get(metric, [])
    if metric != "reward/mean":
        values = [math.log(value) for value in values if value > 0]
    return f"{cell:10} {sparkline(values)}" if len(values) > 1 else cell


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve in one line of text, from the least value to the largest; with more values than `width`, of means."""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BARS[3] * count
    # A hair above the middle of two bars: equal values have equal bars, however their mean is rounded.
    return "".join(_BARS[int(7 * (mean - low) / (high - low) + 0.5 + 1e-9)] for mean in means)


def _percent(shares: dict[str, float]) -> str:
    other = 1 - sum(shares.values())
    parts = [f"{part} {100 * share:.0f} %" for part, share in [*shares.items(), ("other", other)]]
    return ", ".join(parts) if shares else ""


def _cells(status: Status) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        status.state,
        f"{status.steps_done}/{status.steps}" if status.steps is not None else "",
        number(status.reward, ".3f"),
        number(status.accuracy, ".3f"),
        f"2^{math.log2(scale):g}" if (scale := status.loss_scale or 0) > 0 else "",
        number(status.skipped, ".0f"),
        number(status.tokens_per_s, ",.0f"),
        "" if status.left_s is None else f"{status.left_s / 60:.1f} min",
        _note(status),
    ]


def _note(status: Status) -> str:
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
