"""The table and figures of a mismatch study."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from megatron_fp16rl.tools.report import figures
from megatron_fp16rl.utils.files import read_json_lines

COLUMNS = {
    "logprob_abs_mean": "mean |log pi - log mu|",
    "logprob_abs_max": "largest",
    "kl_k3": "KL a token (k3)",
    "kl_seq": "KL a sequence",
    "seq_log_ratio_std": "std of a sequence's log ratio",
    "slope_per_1k_tokens": "slope per 1k tokens",
    "ess": "ESS",
    "phantom_clip_fraction": "tokens that PPO at mu would clip",
    "learner_noise": "the learner against itself",
}


def write_figures(folder: Path, result: dict[str, Any]) -> Path:
    """Writes mismatch.png and, if layers were compared, layers.png; returns the first's path."""
    scored = [read_json_lines(folder / row["dtype"] / "scored.jsonl") for row in result["rows"]]
    figures.to_png(mismatch_figure(result["rows"], scored), folder / "mismatch.png")
    if result["layers"]:
        figures.to_png(layers_figure(result["layers"]), folder / "layers.png")
    return folder / "mismatch.png"


def table(result: dict[str, Any]) -> Table:
    """The metrics of each dtype, for the terminal."""
    rows, ratios = result["rows"], result["bf16_over_fp16"] or {}
    table = Table("", *(row["dtype"] for row in rows), *(["bf16 / fp16"] if ratios else []))
    for key in ("sequences", "tokens"):
        table.add_row(key, *(str(row[key]) for row in rows))
    for key, title in COLUMNS.items():
        ratio = [f"{ratios[key]:.3g}"] if key in ratios else []
        values = (
            row.get(key) for row in rows
        )  # of a study made by an older version some are missing
        table.add_row(title, *("-" if v is None else f"{v:.3g}" for v in values), *ratio)
    jumps = {dtype: layers["first_jump"] or "none" for dtype, layers in result["layers"].items()}
    table.add_row("first layer with a jump", *(jumps.get(row["dtype"], "-") for row in rows))
    return table


def mismatch_figure(rows: list[dict[str, Any]], scored: list[list[dict[str, Any]]]) -> Figure:
    """As figure 2 of arXiv 2510.26788: token probabilities above, sequences' log ratios below."""
    size = (3.8 * len(rows), 7.2)
    figure, axes = plt.subplots(
        2, len(rows), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for (above, below), row, sequences in zip(axes.T, rows, scored, strict=True):
        colour = figures.DTYPE_COLOURS[row["dtype"]]
        mu, pi = (
            np.exp(np.concatenate([sequence[key] for sequence in sequences]))
            for key in ("mu_logprobs", "pi_logprobs")
        )
        above.scatter(mu, pi, s=3, alpha=0.3, lw=0, color=colour, rasterized=True)
        above.plot([0, 1], [0, 1], color="black", lw=0.5)
        above.set_title(f"{row['dtype']}, {len(mu):,} tokens", loc="left", fontsize=10)
        above.set_xlabel("token probability under mu (SGLang)")

        lengths = np.array([len(sequence["response_ids"]) for sequence in sequences])
        ratios = np.array([sequence["log_ratio"] for sequence in sequences])
        below.scatter(lengths, ratios, s=10, alpha=0.6, lw=0, color=colour)
        slope, ends = row["slope_per_1k_tokens"], np.array([lengths.min(), lengths.max()])
        line = ratios.mean() + slope / 1000 * (ends - lengths.mean())
        below.plot(ends, line, color="black", lw=1, label=f"{slope:+.3g} per 1k tokens")
        below.legend(fontsize=8, loc="best")
        below.set_xlabel("tokens of the response")
    axes[0, 0].set_ylabel("token probability under pi (Megatron)")
    axes[1, 0].set_ylabel("log(pi / mu) of a sequence, nats")
    figures.tidy(axes.flat)
    return figure


def layers_figure(layers: dict[str, dict[str, Any]]) -> Figure:
    """The difference between the engines at each layer, in the order in which a model computes."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for dtype, compared in layers.items():
        colour = figures.DTYPE_COLOURS[dtype]
        names = [row["point"] for row in compared["points"]]
        # What is exactly zero has no place on a log axis.
        values = [row["difference"] or np.nan for row in compared["points"]]
        axis.plot(names, values, "o-", ms=3, lw=1, color=colour, label=dtype)
        if compared["first_jump"]:
            axis.axvline(compared["first_jump"], color=colour, lw=5, alpha=0.2)
    axis.set_yscale("log")
    axis.set_ylabel("|SGLang - Megatron| / |fp32|")
    axis.tick_params("x", rotation=90, labelsize=7)
    axis.legend(fontsize=8)
    figures.tidy([axis])
    return figure
