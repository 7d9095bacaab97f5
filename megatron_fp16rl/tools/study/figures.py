"""The tables and figures of a mismatch study."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from megatron_fp16rl.metrics.top_mismatched import Row
from megatron_fp16rl.tools.report import figures
from megatron_fp16rl.tools.study.run import read_scored

_MAX_LAYERS = 5  # of a dtype, in a table
COLUMNS = {
    "logprob_abs_mean": "mean |log pi - log mu|",
    "logprob_abs_max": "largest",
    "kl_k3": "KL a token (k3)",
    "kl_seq": "KL a sequence",
    "seq_log_ratio_std": "std of a sequence's log ratio",
    "slope_per_1k_tokens": "slope per 1k tokens",
    "ess": "ESS",
}
_COLOURS = {"fp16": "#2ca02c", "bf16": "#d62728", "fp32": "#4c78a8"}


def write_figures(folder: Path, result: dict[str, Any]) -> Path:
    """Writes mismatch.png and, if layers were compared, layers.png; returns the first's path."""
    scored = {row["dtype"]: read_scored(folder, row["dtype"]) for row in result["rows"]}
    figures.to_png(mismatch_figure(result["rows"], scored), folder / "mismatch.png")
    if result["layers"]:
        figures.to_png(layers_figure(result["layers"]), folder / "layers.png")
    return folder / "mismatch.png"


def tables(result: dict[str, Any]) -> list[Table]:
    """For the terminal: the metrics, and of each dtype the layers that differ most."""
    rows, ratios = result["rows"], result["bf16_over_fp16"]
    metrics = Table("", *(row["dtype"] for row in rows), *(["bf16 / fp16"] if ratios else []))
    for key in ("sequences", "tokens"):
        metrics.add_row(key, *(str(row[key]) for row in rows))
    for key, title in COLUMNS.items():
        ratio = [f"{ratios[key]:.3g}"] if key in (ratios or {}) else []
        metrics.add_row(title, *(f"{row[key]:.3g}" for row in rows), *ratio)
    shown = [metrics]
    for dtype, layers in result["layers"].items():
        jump = layers["first_jump"]
        verdict = f"first jump: {jump}" if jump else "no jump"
        table = Table(
            "largest first",
            "difference",
            "SGLang's error",
            "Megatron's error",
            title=f"hidden states in {dtype}, {layers['tokens']} tokens; {verdict}",
            caption=f"grows most at {', '.join(layers['grows_most'])}",
        )
        for row in layers["points"][:_MAX_LAYERS]:
            keys = ("difference", "served_error", "learnt_error")
            table.add_row(row["point"], *(f"{row[key]:.2e}" for key in keys))
        shown.append(table)
    return shown


def mismatch_figure(rows: list[dict[str, Any]], scored: dict[str, list[Row]]) -> Figure:
    """As figure 2 of arXiv 2510.26788: token probabilities above, sequences' log ratios below."""
    count = len(rows)
    figure, axes = plt.subplots(
        2, count, figsize=(3.8 * count, 7.2), layout="constrained", squeeze=False, sharey="row"
    )
    for column, row in enumerate(rows):
        dtype = row["dtype"]
        _probabilities(axes[0, column], scored[dtype], dtype)
        _log_ratios(axes[1, column], scored[dtype], dtype, row["slope_per_1k_tokens"])
    axes[0, 0].set_ylabel("token probability under pi (Megatron)")
    axes[1, 0].set_ylabel("log(pi / mu) of a sequence, nats")
    _tidy(axes.flat)
    return figure


def _probabilities(axis: Axes, rows: list[Row], dtype: str) -> None:
    mu, pi = (
        np.exp(np.concatenate([row[key] for row in rows])) for key in ("mu_logprobs", "pi_logprobs")
    )
    axis.scatter(mu, pi, s=3, alpha=0.3, lw=0, color=_COLOURS[dtype], rasterized=True)
    axis.plot([0, 1], [0, 1], color="black", lw=0.5)
    axis.set_aspect("equal")
    axis.set_title(f"{dtype}, {len(mu):,} tokens", loc="left", fontsize=10)
    axis.set_xlabel("token probability under mu (SGLang)")


def _log_ratios(axis: Axes, rows: list[Row], dtype: str, slope: float) -> None:
    lengths = np.array([len(row["response_ids"]) for row in rows])
    ratios = np.array([row["log_ratio"] for row in rows])
    axis.scatter(lengths, ratios, s=10, alpha=0.6, lw=0, color=_COLOURS[dtype])
    ends = np.array([lengths.min(), lengths.max()])
    line = ratios.mean() + slope / 1000 * (ends - lengths.mean())
    axis.plot(ends, line, color="black", lw=1, label=f"{slope:+.3g} per 1k tokens")
    axis.legend(fontsize=8, loc="best")
    axis.set_xlabel("tokens of the response")


def layers_figure(layers: dict[str, dict[str, Any]]) -> Figure:
    """The difference between the engines at each layer, in the order in which a model computes."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for dtype, compared in layers.items():
        rows = sorted(compared["points"], key=lambda row: row["order"])
        names = [row["point"] for row in rows]
        for key, style in (("difference", "o-"), ("learnt_error", ":")):
            # What is exactly zero has no place on a log axis.
            values = [row[key] or np.nan for row in rows]
            if np.isnan(values).all():  # of the reference against itself
                continue
            label = (
                f"{dtype}: SGLang - Megatron"
                if key == "difference"
                else f"{dtype}: Megatron - fp32"
            )
            axis.plot(names, values, style, ms=3, lw=1, color=_COLOURS[dtype], label=label)
        if compared["first_jump"]:
            axis.axvline(compared["first_jump"], color=_COLOURS[dtype], lw=5, alpha=0.2)
    axis.set_yscale("log")
    axis.set_ylabel("relative to the fp32 hidden state")
    axis.tick_params("x", rotation=90, labelsize=7)
    axis.legend(fontsize=8)
    _tidy([axis])
    return figure


def _tidy(axes: Iterable[Axes]) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
