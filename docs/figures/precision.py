"""Draws the plots of precision.md from measurements made here: about ten minutes on two cores.

python docs/figures/precision.py FOLDER      runs go to FOLDER; those that are there are not made again
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).parent.parent
RECIPE = DOCS.parent / "recipes" / "tiny" / "dense-grpo-fp16.yaml"
STEPS = 60  # of four updates
SCALES = {0: "#4c78a8", 15: "#2ca02c", 22: "#d62728"}  # exponents of initial loss scales
DTYPES = {"bf16": "#d62728", "fp16": "#2ca02c", "fp32": "#4c78a8"}
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}

Rows = list[dict]


def main(folder: Path) -> None:
    """Makes the runs that are missing, then all plots."""
    start = warm_started(folder)
    rounding(start, folder)
    loss_scale(start, folder)
    mismatch(start, folder)


def warm_started(folder: Path) -> list[str]:
    """Settings with which every run starts from the same weights: those of the recipe's warm start."""
    run(folder, "start", "trainer.steps=0")
    return [f"model={{path: {folder}/start/export, build: null}}", "warm_start=null"]


def run(folder: Path, name: str, *settings: str) -> Rows:
    """The metrics of a run of the tiny recipe, which is made if it is not there."""
    if not (folder / name / "summary.json").exists():
        given = [f"trainer.steps={STEPS}", f"trainer.run_root={folder}", "gates=[]", *settings]
        options = [word for setting in given for word in ("--set", setting)]
        command = [sys.executable, "-m", "megatron_fp16rl.cli", "train", str(RECIPE)]
        subprocess.run([*command, "--name", name, *options], check=True)
    metrics = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in metrics.open()] if metrics.exists() else []


def rounding(start: Sequence[str], folder: Path) -> None:
    """What a dtype makes of numbers by their size; how large the gradients of a real update are."""
    figure, axes = plt.subplots(2, 1, figsize=(8.4, 5.6), layout="constrained", sharex=True)
    exponents = torch.arange(-40, 20, 0.25)
    draw = torch.Generator().manual_seed(0)
    for name, dtype in _TORCH.items():
        numbers = 2.0 ** (exponents[:, None] + 0.25 * torch.rand(60 * 4, 2000, generator=draw))
        errors = ((numbers.to(dtype).float() - numbers).abs() / numbers).mean(1)
        shown = errors.isfinite()
        axes[0].plot(exponents[shown], errors[shown], color=DTYPES[name], label=name)
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylabel("mean relative error")
    axes[0].set_title("Rounding a number of this size", loc="left", fontsize=10)

    sizes = gradient_sizes(start, folder)
    for exponent in (0, 15):
        values, edges = torch.histogram(sizes + exponent, bins=120, range=(-40.0, 20.0))
        label = "without a loss scale" if exponent == 0 else f"times $2^{{{exponent}}}$"
        axes[1].stairs(
            100 * values / len(sizes), edges, fill=True, alpha=0.6, color=SCALES[exponent], label=label
        )
    lost = (sizes < -25).float().mean().item()
    coarse = ((sizes >= -25) & (sizes < -14)).float().mean().item()
    print(f"gradients: {len(sizes)} not zero; fp16 makes {lost:.1%} zero, {coarse:.1%} subnormal")
    axes[1].set_ylabel("% of gradients")
    axes[1].set_xlabel("size, as a power of 2")
    axes[1].set_title("Gradients of one update of the tiny model, in fp32", loc="left", fontsize=10)
    for axis in axes:
        axis.axvspan(-40, -25, color="k", alpha=0.10, lw=0)
        axis.axvspan(-25, -14, color="k", alpha=0.05, lw=0)
        axis.axvspan(16, 20, color="k", alpha=0.10, lw=0)
        axis.set_xlim(-40, 20)
    for x, text in ((-32.5, "fp16: zero"), (-19.5, "fp16: subnormal"), (18, "fp16: inf")):
        axes[0].text(x, 0.7, text, ha="center", va="top", fontsize=8)
    finish(axes, "half-precision.png")


def gradient_sizes(start: Sequence[str], folder: Path) -> torch.Tensor:
    """log2 of all gradients that are not zero, of the first update of a recorded step, in fp32."""
    run(folder, "recorded", *start, "precision=fp32", "trainer.steps=1", "rollout.record=true")
    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.learner.world import initialize
    from megatron_fp16rl.recipe import load
    from megatron_fp16rl.rollout.recording import Replay
    from megatron_fp16rl.weights.build import model_folder

    settings = [*start, "precision=fp32", f"rollout.replay={folder}/recorded/rollouts"]
    alone = ["learner.ranks=1", "learner.tensor_parallel=1", "learner.optimizer.clip_grad=1e9"]
    recipe = load(RECIPE, [*settings, *alone])
    world = initialize(recipe.learner, seed=0)
    learner = Learner(recipe, model_folder(recipe.model), world)
    batch = learner.prepare(learner.score(Replay(recipe, world).collect(0)))
    part = batch.rows(torch.arange(recipe.learner.global_batch_size))
    learner.train_step(part, learner.algorithm.token_losses, learner.algorithm.normaliser(part))
    pieces = [piece for chunk in learner.model.trained for piece in chunk]
    found = torch.cat([piece.parameter.main_grad.flatten() for piece in pieces])
    return found[found != 0].abs().log2()


def loss_scale(start: Sequence[str], folder: Path) -> None:
    """Runs at several initial scales: the scale, skipped updates, and gradients that fp16 would lose."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for exponent, colour in SCALES.items():
        scale = f"precision.loss_scale={{initial: {2**exponent}, window: 40}}"
        rows = run(folder, f"scale-{exponent}", *start, scale)
        draw_scale(axes[0], rows, exponent, colour)
        lost = [(row["step"] + 1, row["fp16/grad_underflow_fraction"]) for row in rows]
        axes[1].plot(*zip(*((s, v) for s, v in lost if v is not None), strict=True), color=colour)
    axes[0].set_yscale("log", base=2)
    axes[0].set_title("fp16/loss_scale; crosses: skipped updates", loc="left", fontsize=10)
    axes[1].set_yscale("log")
    axes[1].set_title("fp16/grad_underflow_fraction", loc="left", fontsize=10)
    for axis in axes:
        axis.set_xlabel("step")
    finish(axes[:1], "loss-scale.png")


def draw_scale(axis: Axes, rows: Rows, exponent: int, colour: str) -> None:
    """The scale after each step, from the initial one; crosses where updates were skipped."""
    steps, scales = [0], [2.0**exponent]
    skips, before = [], 0
    for row in rows:
        steps.append(row["step"] + 1)
        scales.append(row["fp16/loss_scale"])
        if row["fp16/skipped_total"] > before:
            skips.append((steps[-1], scales[-1]))
            before = row["fp16/skipped_total"]
    label = f"initial $2^{{{exponent}}}$: {before} skipped"
    axis.step(steps, scales, where="post", color=colour, label=label)
    axis.plot([s for s, _ in skips], [v for _, v in skips], "x", color=colour)


def mismatch(start: Sequence[str], folder: Path) -> None:
    """Training-inference mismatch and reward in each dtype, from the same weights."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for dtype, colour in DTYPES.items():
        rows = run(folder, f"dtype-{dtype}", *start, f"precision={dtype}")
        steps = [row["step"] + 1 for row in rows]
        for axis, key in zip(axes, ("mismatch/logprob_abs_mean", "mismatch/kl_k3"), strict=True):
            values = [row[key] for row in rows]
            axis.plot(steps, values, color=colour, label=dtype)
            print(f"{dtype}: {key} {sum(values) / len(values):.2e}")
    axes[0].set_title("mismatch/logprob_abs_mean, nats", loc="left", fontsize=10)
    axes[1].set_title("mismatch/kl_k3, nats", loc="left", fontsize=10)
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlabel("step")
    finish(axes, "mismatch-dtypes.png")


def finish(axes: Sequence[Axes], name: str) -> None:
    """Legends and grids; writes the picture of these axes, and closes it."""
    figure = axes[0].figure
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(DOCS / "images" / name, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
