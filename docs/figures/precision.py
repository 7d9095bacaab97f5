"""Draws the plots of precision.md from measurements made here: about ten minutes on two gpt_models.

python docs/figures/precision.py FOLDER      runs go to FOLDER; those that are there are not made again
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from megatron_fp16rl.utils.processes import free_port

DOCS = Path(__file__).parent.parent
RECIPE = DOCS.parent / "recipes" / "tiny" / "dense-grpo-fp16.yaml"
STEPS = 60  # of four updates
SCALES = {0: "#4c78a8", 15: "#2ca02c", 22: "#d62728"}  # exponents of initial loss scales
DTYPES = {"bf16": "#d62728", "fp16": "#2ca02c", "fp32": "#4c78a8"}

Rows = list[dict]


def main(folder: Path) -> None:
    """Makes the runs that are missing, then all plots."""
    start = warm_started(folder)
    gradients = Gradients(start, folder)
    fp32 = gradients("fp32")
    rounding(fp32)
    gradient_errors(gradients, fp32)
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


def rounding(fp32: torch.Tensor) -> None:
    """What a dtype makes of numbers by their size; how large the gradients of a real update are."""
    _, axes = plt.subplots(2, 1, figsize=(8.4, 5.6), layout="constrained", sharex=True)
    exponents = torch.arange(-40.0, 20.0)
    draw = torch.Generator().manual_seed(0)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        numbers = 2.0 ** (exponents[:, None] + torch.rand(60, 10_000, generator=draw))
        errors = ((numbers.to(dtype).float() - numbers).abs() / numbers).mean(1)
        shown = errors.isfinite()
        axes[0].plot(exponents[shown] + 0.5, errors[shown], color=DTYPES[name], label=name)
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylabel("mean relative error")
    axes[0].set_title("Rounding numbers of this size", loc="left", fontsize=10)
    sizes = fp32[fp32 != 0].abs().log2()
    for exponent in (0, 15):
        share, edges = torch.histogram(sizes + exponent, bins=120, range=(-40.0, 20.0))
        label = f"times $2^{{{exponent}}}$" if exponent else "without a loss scale"
        look = {"fill": True, "alpha": 0.6, "color": SCALES[exponent], "label": label}
        axes[1].stairs(100 * share / len(sizes), edges, **look)
    subnormal = (sizes < -14).float().mean().item()
    print(f"{len(sizes)} gradients, norm {fp32.norm():.3f}, {subnormal:.1%} below 2^-14")
    axes[1].set_ylabel("% of gradients")
    axes[1].set_xlabel("size, as a power of 2")
    axes[1].set_title("Gradients of one update of the tiny model", loc="left", fontsize=10)
    for axis in axes:
        for first, last, shade in ((-40, -25, 0.1), (-25, -14, 0.05), (16, 20, 0.1)):
            axis.axvspan(first, last, color="k", alpha=shade, lw=0)
        axis.set_xlim(-40, 20)
    for x, text in ((-32.5, "fp16: zero"), (-19.5, "fp16: subnormal"), (18, "fp16: inf")):
        axes[0].text(x, 0.7, text, ha="center", va="top", fontsize=8)
    finish(axes, "half-precision.png")


def gradient_errors(of: "Gradients", fp32: torch.Tensor) -> None:
    """How far fp16's gradients are from fp32's, by the loss scale; and bf16's."""
    _, axis = plt.subplots(figsize=(8.4, 3.6), layout="constrained")

    def error(found: torch.Tensor) -> float:
        return ((found - fp32).norm() / fp32.norm()).item()

    errors = {}
    for exponent in range(-16, 26):
        found = of("fp16", 2.0**exponent)
        if found is not None:
            errors[exponent] = error(found)
    bf16 = error(of("bf16"))
    print(f"gradient error: bf16 {bf16:.2e}, fp16 { ({k: f'{v:.1e}' for k, v in errors.items()}) }")
    axis.plot(list(errors), list(errors.values()), "o-", ms=3, color=DTYPES["fp16"], label="fp16")
    axis.axhline(bf16, color=DTYPES["bf16"], label="bf16, which needs no scale")
    axis.axvspan(
        max(errors) + 0.5, 25.5, color="k", alpha=0.1, lw=0, label="fp16: overflow, skipped"
    )
    axis.set_xlim(-16.5, 25.5)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("loss scale, as a power of 2")
    axis.set_title("|g - g in fp32| / |g in fp32| of one update", loc="left", fontsize=10)
    finish([axis], "gradient-error.png")


class Gradients:
    """Gradients of the first update of a recorded step, in any dtype, from the same weights."""

    def __init__(self, start: Sequence[str], folder: Path) -> None:
        run(folder, "recorded", *start, "precision=fp32", "trainer.steps=1", "rollout.record=true")
        from megatron_fp16rl.parallel import initialize
        from megatron_fp16rl.recipe import load

        alone = ["ranks=1", "tensor_parallel=1", "optimizer.clip_grad=1e9"]
        replay = [*start, f"rollout.replay={folder}/recorded/rollouts"]
        self.recipe = load(RECIPE, [*replay, *(f"learner.{setting}" for setting in alone)])
        self.weights = rounded(folder / "start" / "export", folder / "rounded")
        one = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port("127.0.0.1")}
        os.environ.update({k: str(v) for k, v in one.items()}, MASTER_ADDR="127.0.0.1")
        self.world = initialize(self.recipe.learner, seed=0)

    def __call__(self, dtype: str, scale: float = 1.0) -> torch.Tensor | None:
        """All gradients, unscaled, flat; None if they overflow."""
        from megatron_fp16rl.learner.learner import Learner
        from megatron_fp16rl.recipe import Precision
        from megatron_fp16rl.rollout.recording import Replay

        precision = Precision(dtype=dtype)
        recipe = self.recipe.model_copy(update={"precision": precision})
        learner = Learner.from_recipe(recipe, self.weights, self.world)
        if learner.scaler:
            learner.scaler.scale.fill_(scale)
        batch = learner.share(Replay(recipe, self.world).collect(0))
        batch = learner.prepare(learner.score(batch))
        part = batch.rows(torch.arange(recipe.learner.global_batch_size))
        algorithm = learner.algorithm
        outcome, _, _ = learner.train_update(
            part, algorithm.token_losses, algorithm.normaliser(part)
        )
        shards = [shard for shard in learner.model.trained]
        # Megatron's fp32 gradients were unscaled in place.
        return torch.cat([p.main_grad.flatten() for p in shards]) if outcome.stepped else None


def rounded(weights: Path, to: Path) -> Path:
    """The same weights, rounded to numbers that bf16 and fp16 both have."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(weights, to, dirs_exist_ok=True)
    tensors = load_file(to / "model.safetensors")
    save_file(
        {k: v.bfloat16().half() for k, v in tensors.items()},
        to / "model.safetensors",
        {"format": "pt"},
    )
    return to


def loss_scale(start: Sequence[str], folder: Path) -> None:
    """Runs at several initial scales: the scale, skipped updates and held-out accuracy."""
    _, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for exponent, colour in SCALES.items():
        scale = f"precision.loss_scale={{initial: {2**exponent}, window: 40}}"
        rows = run(folder, f"scale-{exponent}", *start, scale)
        draw_scale(axes[0], rows, exponent, colour)
        axes[1].plot(
            [row["step"] + 1 for row in rows], [row["reward/mean"] for row in rows], color=colour
        )
    axes[0].set_yscale("log", base=2)
    axes[0].set_title("fp16/loss_scale; crosses: skipped updates", loc="left", fontsize=10)
    axes[1].set_title("reward/mean", loc="left", fontsize=10)
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
    _, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
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
