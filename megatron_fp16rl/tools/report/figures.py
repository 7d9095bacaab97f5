"""The pictures of a run, from its metrics."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_fp16rl.metrics.log import PARTS, Row, seconds
from megatron_fp16rl.utils.files import write_bytes

DTYPE_COLOURS = {"fp16": "#2ca02c", "bf16": "#d62728", "fp32": "#4c78a8"}
_PART_COLOURS = ("#4c78a8", "#72b7b2", "#f58518", "#b279a2")


def overview(rows: list[Row], title: str, accuracy_before: float | None = None) -> Figure:
    """Reward and accuracy, loss scale, mismatch, and where the time goes, over the steps."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained", sharex=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    (reward, loss_scale), (mismatch, time) = axes

    plot(reward, rows, "reward/mean", "reward, sampled in training")
    plot(reward, rows, "eval/accuracy", "held-out accuracy, sampled at T=1", marker="o")
    if accuracy_before is not None:
        reward.plot([0], [accuracy_before], "o", color="C1")
    reward.set_ylim(-0.02, 1.02)

    if any(row.get("fp16/loss_scale") for row in rows):
        skipped = max(row.get("fp16/skipped_total") or 0 for row in rows)
        label = f"{skipped:.0f} skipped update(s)"
        plot(loss_scale, rows, "fp16/loss_scale", label, drawstyle="steps-post", color="#2ca02c")
        loss_scale.set_yscale("log", base=2)

    plot(mismatch, rows, "mismatch/logprob_abs_mean", "mean |log pi - log mu| a token")
    plot(mismatch, rows, "mismatch/seq_log_ratio_std", "std of log(pi/mu) a sequence")
    plot(mismatch, rows, "mismatch/kl_k3", "KL[mu || pi] a token (k3)")
    plot(mismatch, rows, "staleness/logprob_abs_mean", "the first, with older weights (staleness)")
    mismatch.set_yscale("log")

    steps = [row["step"] + 1 for row in rows]
    heights = [[seconds(row, part) for row in rows] for part in PARTS]
    # Two lanes of a step: what the learner does, stacked, and how long the servers sample beside it.
    time.stackplot(steps, heights, labels=PARTS, colors=_PART_COLOURS, step="mid", lw=0)
    sampling = [row.get("time/rollout_s") or 0.0 for row in rows]
    if any(s > waited for s, waited in zip(sampling, heights[0], strict=True)):
        time.plot(steps, sampling, color="black", lw=1, label="sampling, on the servers")

    titles = ("Reward", "FP16 loss scale", "Training-inference mismatch, nats", "Seconds a step")
    for axis, text in zip(axes.flat, titles, strict=True):
        axis.set_title(text, loc="left", fontsize=10)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="best")
    for axis in axes[1]:
        axis.set_xlabel("step")
    tidy(axes.flat)
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())


def tidy(axes: Iterable[Axes]) -> None:
    """No box, a light grid."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)


def plot(axis: Axes, rows: list[Row], key: str, label: str, **style: Any) -> None:
    """A metric over the steps (from 1) at which it was recorded; nothing of one that never was."""
    present = [(row["step"] + 1, row[key]) for row in rows if row.get(key) is not None]
    if not present:
        return
    axis.plot(*zip(*present, strict=True), label=label, **{"lw": 1.2, "ms": 3.5, **style})


def running_mean(rows: list[Row], key: str, width: int) -> list[Row]:
    """Each step that has a metric, with the mean of it and of up to `width` - 1 before it."""
    present = [row for row in rows if row.get(key) is not None]
    means = []
    for end, row in enumerate(present, 1):
        window = present[max(0, end - width) : end]
        means.append({"step": row["step"], key: sum(each[key] for each in window) / len(window)})
    return means
