"""Runs side by side: their curves on the same axes, how they fared, and the keys of their recipes that differ."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import Row
from megatron_fp16rl.recipe import notation
from megatron_fp16rl.tools.report import figures, page
from megatron_fp16rl.utils.files import write_text

_SMOOTH = 20  # steps: the width of a running mean, in runs of more than twice as many
_ABSENT = "(absent)"
_OWN = ("name", "description")  # of every run its own
_TITLES = (
    "Reward",
    "Held-out accuracy",
    "Mean |log pi - log mu|, nats",
    "FP16 loss scale",
    "Seconds a step",
)
Table = list[tuple[str, ...]]


@dataclass(frozen=True)
class RunRecord:
    """A run, as far as it got.

    values    of its recipe, by dotted keys, without secrets; none if it cannot be read
    """

    name: str
    rows: list[Row]
    values: dict[str, Any]


def read(folders: Sequence[Path], warn: page.Warn) -> list[RunRecord]:
    """Raises RecipeError if one has no step, Unreadable."""
    names = _names(folders)
    return [
        RunRecord(
            name,
            page.steps(folder, warn),
            notation.flat(page.recipe_values(folder / "recipe.yaml", warn)),
        )
        for name, folder in zip(names, folders, strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    depth = 1
    deepest = max(len(folder.parts) for folder in folders)
    while len({folder.parts[-depth:] for folder in folders}) < len(folders) and depth < deepest:
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def default_file(folders: Sequence[Path]) -> Path:
    """A-vs-B.html beside the first run."""
    names = "-vs-".join(folder.name for folder in folders)
    return folders[0].parent / f"{names[:200]}.html"


def differences(runs: Sequence[RunRecord]) -> Table:
    """The keys that are not the same in all runs: key, and a value a run."""
    keys = dict.fromkeys(key for run in runs for key in run.values)
    rows = [(key, *(str(run.values.get(key, _ABSENT)) for run in runs)) for key in keys]
    return [row for row in rows if row[0] not in _OWN and len(set(row[1:])) > 1]


def results(runs: Sequence[RunRecord]) -> Table:
    """How the runs fared: what, and a value a run. Means are over all steps, the reward's over the last 20."""

    def row(text: str, form: str, value: Callable[[list[Row]], float | None]) -> tuple[str, ...]:
        values = [value(run.rows) for run in runs]
        return (text, *("" if v is None else format(v, form) for v in values))

    def mean(key: str, last: int = 0) -> Callable[[list[Row]], float | None]:
        def of(rows: list[Row]) -> float | None:
            values = metrics.values(rows[-last:], key)
            return sum(values) / len(values) if values else None

        return of

    def final(key: str) -> Callable[[list[Row]], float | None]:
        return lambda rows: next(reversed(metrics.values(rows, key)), None)

    return [
        row("steps", "d", len),
        row(f"reward, last {_SMOOTH} steps", ".3f", mean("reward/mean", _SMOOTH)),
        row("held-out accuracy, last", ".3f", final("eval/accuracy")),
        row("mean |log pi - log mu|", ".1e", mean("mismatch/logprob_abs_mean")),
        row("loss scale, last", ",.0f", final("fp16/loss_scale")),
        row("skipped updates", ".0f", final("fp16/skipped_total")),
        row("seconds a step", ".2f", mean("time/step_s")),
    ]


def figure(runs: Sequence[RunRecord]) -> Figure:
    """Reward, held-out accuracy, mismatch, loss scale and seconds a step, a colour a run."""
    drawn, axes = plt.subplots(2, 3, figsize=(13, 6.4), layout="constrained", sharex=True)
    reward, held_out, mismatch, loss_scale, seconds, legend = axes.flat
    smooth = max(len(run.rows) for run in runs) > 2 * _SMOOTH
    for run, colour in zip(runs, _colours(runs), strict=True):
        style: dict[str, Any] = {"color": colour, "label": run.name.replace("$", r"\$")}
        for axis, key in (
            (reward, "reward/mean"),
            (mismatch, "mismatch/logprob_abs_mean"),
            (seconds, "time/step_s"),
        ):
            if smooth:
                figures.plot(
                    axis, run.rows, key, **{**style, "label": "_", "alpha": 0.25, "lw": 0.7}
                )
            mean = figures.running_mean(run.rows, key, _SMOOTH) if smooth else run.rows
            figures.plot(axis, mean, key, **style)
        figures.plot(held_out, run.rows, "eval/accuracy", marker="o", **style)
        figures.plot(loss_scale, run.rows, "fp16/loss_scale", drawstyle="steps-post", **style)
    for axis in (reward, held_out):
        axis.set_ylim(-0.02, 1.02)
    mismatch.set_yscale("log")
    if any(row.get("fp16/loss_scale") for run in runs for row in run.rows):
        loss_scale.set_yscale("log", base=2)
    else:
        loss_scale.text(0.5, 0.5, "none is in FP16", ha="center", transform=loss_scale.transAxes)
    seconds.set_ylim(
        0, 2 * _median_of_longest(runs)
    )  # a step that evaluates or saves may stick out
    for axis, title in zip(axes.flat, _TITLES, strict=False):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelbottom=True)
    figures.tidy(axes.flat[:-1])
    legend.axis("off")
    legend.legend(*reward.get_legend_handles_labels(), loc="upper left", frameon=False)
    if smooth:
        legend.text(
            0.03, 0.05, f"thick: means of the last {_SMOOTH} steps; thin: each step", fontsize=9
        )
    return drawn


def _colours(runs: Sequence[RunRecord]) -> list[str]:
    """Those of the precisions, as in all pictures, if every run has another; else matplotlib's."""
    dtypes = [run.values.get("precision.dtype") for run in runs]
    if len(set(dtypes)) == len(runs) and set(dtypes) <= set(figures.DTYPE_COLOURS):
        return [figures.DTYPE_COLOURS[str(dtype)] for dtype in dtypes]
    return [f"C{number % 10}" for number in range(len(runs))]


def _median_of_longest(runs: Sequence[RunRecord]) -> float:
    """The median step of the run whose steps take longest."""
    seconds = [[row.get("time/step_s") or 0.0 for row in run.rows] for run in runs]
    return max(statistics.median(each) for each in seconds) or 1.0


def write(
    folders: Sequence[Path], file: Path, png: Path | None, warn: page.Warn
) -> list[RunRecord]:
    """Writes a page about runs side by side to `file`, and its picture to `png`. Raises as `read`."""
    runs = read(folders, warn)
    if png is not None:
        figures.to_png(figure(runs), png)
    text = page.render(
        "comparison.html.j2",
        names=[run.name for run in runs],
        figure=figures.to_svg(figure(runs)),
        results=results(runs),
        differences=differences(runs),
    )
    write_text(file, text)
    return runs
