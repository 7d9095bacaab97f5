"""The table and the curves of a sanity grid."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from rich.table import Table

from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.tools.report import figures
from megatron_fp16rl.tools.sanity import Cell, smooth
from megatron_fp16rl.utils.files import Unreadable

_COLOURS = {"fp16": "#2ca02c", "bf16": "#d62728"}
_SMOOTH = 5  # steps
_COLUMNS = {  # of numbers: key, title and format
    "reward_best": ("reward: best", ".3f"),
    "reward_last": ("last", ".3f"),
    "accuracy_last": ("accuracy", ".3f"),
    "steps_to_95": ("steps to 0.95", "d"),
    "mismatch_mean": ("mean |dlogp|", ".1e"),
    "mismatch_max": ("largest", ".1e"),
    "skipped": ("skipped", "d"),
    "wall_s": ("s", ".0f"),
}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal; the last column says why a run broke, and what of its metrics is damaged."""
    shown = Table("algorithm", "dtype", "seed", *(title for title, _ in _COLUMNS.values()), "")
    for row in rows:
        numbers = [
            "-" if row[key] is None else format(row[key], form)
            for key, (_, form) in _COLUMNS.items()
        ]
        notes = [row["reason"] or "collapsed"] if row["collapsed"] else []
        notes += row["faults"]
        shown.add_row(row["algorithm"], row["dtype"], str(row["seed"]), *numbers, "; ".join(notes))
    return shown


def write_curves(out: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Draws reward above and mismatch below, a column for each algorithm, fp16 against bf16."""
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    count = len(algorithms)
    figure, axes = plt.subplots(
        2, count, figsize=(2.6 * count + 0.8, 5.2), layout="constrained", squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    for column, algorithm in enumerate(algorithms):
        axes[0, column].set_title(algorithm, fontsize=10)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("step")
    for row in rows:
        cell = Cell(row["algorithm"], row["dtype"], row["seed"])
        steps: list[metrics.Row] = []
        with contextlib.suppress(Unreadable):  # the table has the reason
            steps = metrics.read(out / "cells" / cell.name).rows
        numbers = [step["step"] + 1 for step in steps]
        rewards = [step.get("reward/mean") or 0.0 for step in steps]
        mismatch = [step.get("mismatch/logprob_abs_mean") or math.nan for step in steps]
        style: dict[str, Any] = {"color": _COLOURS[cell.dtype], "lw": 1.2, "alpha": 0.8}
        above, below = axes[:, algorithms.index(cell.algorithm)]
        label = cell.dtype if cell.seed == 0 else None
        above.plot(numbers, smooth(rewards, _SMOOTH), label=label, **style)
        below.plot(numbers, mismatch, **style)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("training reward")
    axes[1, 0].set_ylabel("mean |log pi - log mu|")
    axes[0, 0].legend(fontsize=8)
    figures.to_png(figure, out / "curves.png")
    return out / "curves.png"
