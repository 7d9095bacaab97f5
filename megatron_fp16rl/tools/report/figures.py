"""The pictures of a run, from its metrics."""

import io
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_fp16rl.metrics.run import PARTS

Rows = list[dict[str, object]]
_COLOURS = dict(zip(PARTS, ("#4c78a8", "#72b7b2", "#f58518", "#b279a2"), strict=True))


def overview(rows: Rows, title: str, accuracy_before: float | None = None) -> Figure:
    """Reward and accuracy, loss scale, mismatch, and where the time goes, over the steps."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained", sharex=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    _reward(axes[0, 0], rows, accuracy_before)
    _loss_scale(axes[0, 1], rows)
    _mismatch(axes[1, 0], rows)
    _time(axes[1, 1], rows)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.margins(x=0.01)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element, and closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure, path: Path) -> None:
    """Writes the figure, and closes it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps (from 1) and values of a metric, where it was recorded."""
    present = [(row["step"] + 1, row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in present], [value for _, value in present]


def _reward(axis: Axes, rows: Rows, before: float | None) -> None:
    axis.plot(*_series(rows, "reward/mean"), lw=1, alpha=0.6, label="reward, sampled in training")
    steps, values = _series(rows, "eval/accuracy")
    if before is not None:
        steps, values = [0, *steps], [before, *values]
    axis.plot(
        steps, values, "o-", ms=3.5, color="#d62728", label="held-out accuracy, sampled at T=1"
    )
    axis.set_ylim(-0.02, 1.02)
    axis.set_title("Reward", loc="left", fontsize=10)
    axis.legend(fontsize=8, loc="lower right")


def _loss_scale(axis: Axes, rows: Rows) -> None:
    steps, scales = _series(rows, "fp16/loss_scale")
    axis.set_title("FP16 loss scale", loc="left", fontsize=10)
    if not steps:
        axis.text(
            0.5, 0.5, "no loss scaling in this precision", ha="center", transform=axis.transAxes
        )
        return
    axis.step(steps, scales, where="post", color="#2ca02c")
    skips, total = [], 0
    for row in rows:
        if (row.get("fp16/skipped_total") or 0) > total:
            skips.append((row["step"] + 1, row.get("fp16/loss_scale") or math.nan))
            total = row["fp16/skipped_total"]
    label = f"{total} skipped update(s)"
    axis.plot([s for s, _ in skips], [v for _, v in skips], "x", color="#d62728", label=label)
    axis.set_yscale("log", base=2)
    low, high = math.log2(min(scales)), math.log2(max(scales))
    axis.set_ylim(2 ** (low - 1), 2 ** (high + 1))
    axis.legend(fontsize=8, loc="lower right")


def _mismatch(axis: Axes, rows: Rows) -> None:
    for key, label in (
        ("mismatch/logprob_abs_mean", "mean |log pi - log mu| a token"),
        ("mismatch/seq_log_ratio_std", "std of log(pi/mu) a sequence"),
        ("mismatch/kl_k3", "KL[mu || pi] a token (k3)"),
    ):
        axis.plot(*_series(rows, key), lw=1.2, label=label)
    axis.set_yscale("log")
    axis.set_title("Training-inference mismatch, nats", loc="left", fontsize=10)
    axis.legend(fontsize=8, loc="best")


def _time(axis: Axes, rows: Rows) -> None:
    steps = [row["step"] + 1 for row in rows]
    heights = [[row.get(f"time/{part}_s") or 0.0 for row in rows] for part in PARTS]
    colours = [_COLOURS[part] for part in PARTS]
    axis.stackplot(steps, heights, labels=PARTS, colors=colours, step="mid", lw=0)
    axis.set_ylim(bottom=0)
    axis.set_title("Seconds a step", loc="left", fontsize=10)
    axis.legend(fontsize=8, loc="upper right", ncols=4)
