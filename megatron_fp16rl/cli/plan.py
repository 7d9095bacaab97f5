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

    Nothing is computed and no GPU is needed: every pipeline stage is built by Megatron-core itself, at
    the recipe's true size, on a device that holds no values. Exit code 1 if it does not fit; changes with
    which it would are looked for. How figures are made, and how good they are: docs/planner.md.

    Examples:

        fp16rl plan qwen3-14b-dapo-fp16-4n8g

        fp16rl plan recipes/mine.yaml --nodes 8 --gpu h200 --set learner.micro_batch_tokens=16384 --json
    """
    # Megatron warns of libraries that are not here, and that no plan needs.
    warnings.simplefilter("ignore")
    from megatron_fp16rl.checks import check
    from megatron_fp16rl.tools import recipes
    from megatron_fp16rl.tools.plan.plan import as_json as to_json
    from megatron_fp16rl.tools.plan.plan import plan

    try:
        wanted = load(recipes.find(str(recipe)), overrides or [])
        if nodes is not None:
            wanted = recipes.on_nodes(wanted, nodes)
        check(wanted, partial=True)
        kind = gpu or (wanted.slurm.gpu if wanted.slurm else _DEFAULT_GPU)
        with Console(stderr=True).status("", spinner="dots") as status:
            found = plan(
                wanted, kind, lambda line: status.update(Text(line)), mean_tokens=mean_tokens
            )
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    if as_json:
        print(json.dumps(to_json(found)))
    else:
        _show(found)
    if not found.fits:
        raise typer.Exit(FAILED)


_COLUMNS = {
    "stage": lambda r: str(r.stage),
    "ranks": lambda r: f"{r.ranks[0]}-{r.ranks[1]}" if r.ranks[1] > r.ranks[0] else str(r.ranks[0]),
    "weights": lambda r: _gib(r.weights),
    "gradients": lambda r: _gib(r.gradients),
    "main weights": lambda r: _gib(r.main_weights),
    "Adam": lambda r: _gib(r.adam),
    "activations": lambda r: f"{_gib(r.activations)} ({r.in_flight})",
    "recompute": lambda r: _gib(r.transient),
    "log-probs": lambda r: _gib(r.logits),
    "batch": lambda r: _gib(r.batch),
    "sync": lambda r: _gib(r.sync),
    "peak": lambda r: _gib(r.peak),
}


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"


def _show(found: "Plan") -> None:
    layout, rollout, slurm = found.recipe.learner, found.recipe.rollout, found.recipe.slurm
    nodes = f", {slurm.learner_nodes} + {slurm.rollout_nodes} nodes" if slurm else ""
    asked = (
        f" on {found.gpu.name}: {layout.ranks} learner ranks, "
        f"{rollout.servers} server(s) of {rollout.tensor_parallel}{nodes}"
    )
    console.print(Text.assemble((found.recipe.name, "bold"), asked))
    if found.learner:
        table = Table(*_COLUMNS, title="learner, GiB of each rank")
        for rank in found.learner.ranks:
            table.add_row(*(column(rank) for column in _COLUMNS.values()))
        console.print(table)
        console.print(_of_learner(found))
    console.print(_of_servers(found))
    if found.times:
        console.print(_of_times(found))
    for line in found.warnings:
        console.print(line, style="yellow")
    fits, colour = ("fits", "green") if found.fits else ("does not fit", "red")
    console.print(fits, style=f"bold {colour}")
    for line in found.reasons:
        console.print(f"  {line}")
    for change in found.suggestions:
        keys = " ".join(f"--set {key}={value}" for key, value in change.changes.items())
        console.print(f"  would fit ({change.nodes} nodes, {change.step_s:.0f} s a step): {keys}")
    if not found.fits and not found.suggestions:
        console.print(
            "  no change of layout, recomputation, batch or nodes was found with which it fits"
        )


def _of_learner(found: "Plan") -> str:
    worst = found.learner.worst
    margin = (found.gpu.memory - worst.peak) / 2**30
    other = "whole" if found.recipe.learner.distributed_optimizer else "sharded"
    state = worst.optimizer_whole if other == "whole" else worst.optimizer_sharded
    return (
        f"peak {_gib(worst.peak)} GiB of {_gib(found.gpu.memory)} that tensors may take of "
        f"{found.gpu.memory_gib} GiB: margin {margin:.2f} GiB. Optimizer state {other}: {_gib(state)} GiB. "
        f"{found.learner.proof.tensors:,} tensors exported, "
        + (
            "each once, as transformers has them"
            if not found.learner.proof.faults
            else "NOT as they should be"
        )
    )


def _of_servers(found: "Plan") -> str:
    servers = found.servers
    return (
        f"servers: weights {_gib(servers.weights)} GiB, KV cache {_gib(max(0, servers.kv_cache))} GiB "
        f"= {servers.kv_tokens:,} tokens on each GPU: {servers.running} of the longest sequences at once "
        f"({servers.wanted} are asked of each server in a step). SGLang takes this model at tensor_parallel "
        f"{', '.join(map(str, found.admitted[0]))}"
        + (
            f", and at {servers.tensor_parallel} with ep_size {', '.join(map(str, found.admitted[1]))}"
            if len(found.admitted[1]) > 1
            else ""
        )
    )


def _of_times(found: "Plan") -> str:
    times = found.times
    return (
        f"a step: about {times.step_s:.0f} s (rollout {times.rollout_s:.0f}, score {times.score_s:.0f}, "
        f"update {times.update_s:.0f}, sync {times.sync_s:.0f}), {times.tokens_per_s_per_gpu:,.0f} tokens/s "
        f"a GPU; an estimate, for responses of {times.breakdown['mean_response_tokens']:,.0f} tokens on average"
    )
