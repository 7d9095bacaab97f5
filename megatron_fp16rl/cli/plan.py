"""fp16rl plan: whether a recipe fits, and how long a step takes, before anything is queued."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, AsJson, Overrides, console, fail
from megatron_fp16rl.recipe import Gpu, RecipeError, load
from megatron_fp16rl.utils.terminal import Console

if TYPE_CHECKING:
    from megatron_fp16rl.tools.plan.plan import Plan

app = typer.Typer()
_DEFAULT_GPU = "h100-80gb"


@app.command("plan")
def plan_command(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe of whatever size, or the name of one that ships.")
    ],
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Plan it for so many nodes, learner and rollout together."),
    ] = None,
    gpu: Annotated[Gpu | None, typer.Option(help="Default: slurm.gpu of the recipe.")] = None,
    mean_tokens: Annotated[
        float | None,
        typer.Option(min=1, help="Of responses, for times; default: half of max_new_tokens."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a recipe fits its GPUs, what it takes and how long a step may last.

    Nothing is computed and no GPU is needed: Megatron-core itself builds every pipeline stage at the
    recipe's true size, on a device that holds no values. Exit code 1 if the recipe does not fit; single
    changes with which it would are looked for. How figures are made, and how good they are:
    docs/planner.md.

    Examples:

        fp16rl plan qwen3-14b-dapo-fp16-4n8g

        fp16rl plan recipes/mine.yaml --nodes 8 --gpu h200 --set learner.micro_batch_tokens=16384 --json
    """
    warnings.simplefilter("ignore")  # Megatron warns of libraries that no plan needs
    from megatron_fp16rl.checks import check
    from megatron_fp16rl.tools import recipes
    from megatron_fp16rl.tools.plan import plan as planner

    try:
        planned = load(recipes.find(str(recipe)), overrides or [])
        if nodes is not None:
            planned = recipes.on_nodes(planned, nodes)
        check(planned, partial=True)
        kind = gpu or (planned.slurm.gpu if planned.slurm else _DEFAULT_GPU)
        with Console(stderr=True).status("", spinner="dots") as status:
            plan = planner.plan(
                planned, kind, lambda line: status.update(Text(line)), mean_tokens=mean_tokens
            )
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    if as_json:
        print(json.dumps(planner.as_json(plan)))
    else:
        _show(plan)
    if not plan.fits:
        raise typer.Exit(FAILED)


def _show(plan: "Plan") -> None:
    recipe, slurm = plan.recipe, plan.recipe.slurm
    nodes = f", {slurm.learner_nodes} + {slurm.rollout_nodes} nodes" if slurm else ""
    console.print(
        Text.assemble(
            (recipe.name, "bold"),
            f" on {plan.gpu.name}: {recipe.learner.ranks} learner ranks, {recipe.rollout.servers} "
            f"server(s) of {recipe.rollout.tensor_parallel}{nodes}",
        )
    )
    if plan.learner:
        sizes = ["weights", "gradients", "main_weights", "adam", "activations", "transient"]
        sizes += ["logits", "batch", "sync", "peak"]
        heads = (name.replace("_", " ") for name in sizes)
        table = Table("stage", "ranks", "in flight", *heads, title="learner, GiB of each rank")
        for rank in plan.learner.ranks:
            first, last = rank.ranks
            ranks = str(first) if first == last else f"{first}-{last}"
            values = (_gib(getattr(rank, name)) for name in sizes)
            table.add_row(str(rank.stage), ranks, str(rank.in_flight), *values)
        console.print(table)
    for line in _lines(plan):
        console.print(line)
    for line in plan.warnings:
        console.print(line, style="yellow")
    fits, colour = ("fits", "green") if plan.fits else ("does not fit", "red")
    console.print(fits, style=f"bold {colour}")
    for line in plan.reasons:
        console.print(f"  {line}")
    for suggestion in plan.suggestions:
        keys = " ".join(f"--set {key}={value}" for key, value in suggestion.changes.items())
        step = f"{suggestion.nodes} nodes, {suggestion.step_s:.0f} s a step"
        console.print(f"  would fit ({step}): {keys}")
    if not plan.fits and not plan.suggestions:
        console.print("  no single change of layout, recomputation, batch or nodes makes it fit")


def _lines(plan: "Plan") -> list[str]:
    """Learner, servers and times, a line each."""
    learner, servers, times, lines = plan.learner, plan.servers, plan.times, []
    if learner:
        worst, usable = learner.worst, plan.gpu.memory
        lines.append(
            f"peak {_gib(worst.peak)} GiB of {_gib(usable)} that tensors may take: margin "
            f"{_gib(usable - worst.peak)} GiB. Optimizer state {_gib(worst.optimizer_sharded)} GiB with the "
            f"distributed optimizer, {_gib(worst.optimizer_whole)} without. "
            f"{len(learner.exported):,} tensors exported, "
            + ("NOT as they should be" if learner.faults else "each once, as transformers has them")
        )
    sizes = ", ".join(map(str, plan.admitted_tensor_parallel))
    lines.append(
        f"servers: weights {_gib(servers.weights)} GiB, KV cache {_gib(max(0, servers.kv_cache))} GiB "
        f"= {servers.kv_tokens:,} tokens on each GPU: {servers.running} of the longest sequences at once "
        f"(a step has {servers.wanted} for each server). SGLang takes this model at tensor_parallel {sizes}"
    )
    if len(plan.admitted_expert_parallel) > 1:
        sizes = ", ".join(map(str, plan.admitted_expert_parallel))
        lines[-1] += f", and at {servers.tensor_parallel} with ep_size {sizes}"
    if times:
        mean = times.breakdown["mean_response_tokens"]
        lines.append(
            f"a step: about {times.step_s:.0f} s (rollout {times.rollout_s:.0f}, score {times.score_s:.0f}, "
            f"update {times.update_s:.0f}, sync {times.sync_s:.0f}), {times.tokens_per_s_per_gpu:,.0f} "
            f"tokens/s a GPU; an estimate, for responses of {mean:,.0f} tokens on average"
        )
    return lines


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"
