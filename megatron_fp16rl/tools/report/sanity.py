"""The table and the curves of a sanity grid."""

import contextlib
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.tools.report import figures
from megatron_fp16rl.utils.files import Unreadable, write_text

_COLOURS = {"fp16": "#2ca02c", "bf16": "#d62728"}
_SMOOTH = 5  # steps


def write_report(out: Path, rows: Sequence[dict[str, object]]) -> Path:
    """Writes curves.png and report.html of a grid; returns the page's path."""
    figures.to_png(curves(out, rows), out / "curves.png")
    cells = "".join(
        "<tr>" + "".join(f"<td>{escape(value)}</td>" for value in _cells(row)) + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    page = (
        "<!doctype html><meta charset='utf-8'><title>Sanity test</title>"
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:2px 10px;text-align:left}</style>"
        f"<h1>Sanity test: {escape(out.name)}</h1>{figures.to_svg(curves(out, rows))}"
        f"<table><tr>{head}</tr>{cells}</table>"
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def table(rows: Sequence[dict[str, object]]) -> Table:
    """For the terminal."""
    made = Table(*_COLUMNS)
    for row in rows:
        made.add_row(*_cells(row))
    return made


def curves(out: Path, rows: Sequence[dict[str, object]]) -> Figure:
    """Reward above, mismatch below, a column for each algorithm, fp16 against bf16."""
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    count = len(algorithms)
    figure, axes = plt.subplots(
        2, count, figsize=(2.6 * count + 0.8, 5.2), layout="constrained", squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    for column, algorithm in enumerate(algorithms):
        above, below = axes[:, column]
        above.set_title(algorithm, fontsize=10)
        below.set_yscale("log")
        below.set_xlabel("step")
        for row in rows:
            if row["algorithm"] != algorithm:
                continue
            cell = out / "cells" / f"{algorithm}-{row['dtype']}-seed{row['seed']}"
            steps = []
            with contextlib.suppress(Unreadable):  # which the table says
                steps = metrics.read(cell).rows
            style = {"color": _COLOURS[row["dtype"]], "lw": 1.2, "alpha": 0.8}
            label = row["dtype"] if row["seed"] == 0 else None
            numbers = [step["step"] + 1 for step in steps]
            rewards = [s.get("reward/mean") or 0.0 for s in steps]
            above.plot(numbers, _smooth(rewards), label=label, **style)
            apart = [s.get("mismatch/logprob_abs_mean") or math.nan for s in steps]
            below.plot(numbers, apart, **style)
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("training reward")
    axes[1, 0].set_ylabel("mean |log pi - log mu|")
    axes[0, 0].legend(fontsize=8)
    return figure


_COLUMNS = (
    "algorithm", "dtype", "seed", "reward: best", "last", "accuracy", "steps to 0.95",
    "mean |dlogp|", "largest", "skipped", "s", "",
)  # fmt: skip


def _cells(row: dict[str, object]) -> list[str]:
    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    return [
        row["algorithm"],
        row["dtype"],
        str(row["seed"]),
        number("reward_best", ".3f"),
        number("reward_last", ".3f"),
        number("accuracy_last", ".3f"),
        number("steps_to_95", "d"),
        number("mismatch_mean", ".1e"),
        number("mismatch_max", ".1e"),
        number("skipped", "d"),
        number("wall_s", ".0f"),
        "; ".join(
            [(row["reason"] or "collapsed") if row["collapsed"] else "", *row["faults"]]
        ).strip("; "),
    ]


def _smooth(values: list[float]) -> list[float]:
    return [
        sum(values[max(0, i - _SMOOTH + 1) : i + 1]) / min(i + 1, _SMOOTH)
        for i in range(len(values))
    ]
