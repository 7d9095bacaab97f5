"""fp16rl plan: whether a recipe fits, and how long a step takes, before anything is queued."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, AsJson, Overrides, console, fail
from megatron_fp16rl.recipe import Gpu, load
from megatron_fp16rl.utils.terminal import Console

if TYPE_CHECKING:
    from megatron_fp16rl.tools.plan.plan import Plan

app = typer.Typer()
_PARTS = (
    *("weights", "gradients", "main_weights", "adam"),
    *("activations", "transient", "batch", "sync", "peak"),
)


@app.command("plan")
def plan_command(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe of whatever size, or the name of one that ships.")
    ],
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
    changes with which it would are looked for. Of one that fits, so is a faster split of its nodes.
    How figures are made, and how good they are: docs/planner.md.

    Examples:

        fp16rl plan qwen3-14b-dapo-fp16-4n8g

        fp16rl plan recipes/mine.yaml --gpu h200 --set learner.micro_batch_tokens=16384 --json
    """
    warnings.simplefilter("ignore")  # Megatron warns of libraries that no plan needs
    from megatron_fp16rl.checks import check
    from megatron_fp16rl.tools import recipes
    from megatron_fp16rl.tools.plan import plan as planner

    planned = load(recipes.find(str(recipe)), overrides or [])
    check(planned, partial=True)
    if mean_tokens is not None and mean_tokens > planned.rollout.max_new_tokens:
        most = planned.rollout.max_new_tokens
        fail(f"--mean-tokens {mean_tokens:g} is above rollout.max_new_tokens={most}", BAD_RECIPE)
    kind = gpu or (planned.slurm.gpu if planned.slurm else "h100-80gb")
    with Console(stderr=True).status("", spinner="dots") as status:
        plan = planner.plan(
            planned, kind, lambda line: status.update(Text(line)), mean_tokens=mean_tokens
        )
    if as_json:
        print(json.dumps(planner.as_json(plan)))
    else:
        _show(plan)
    if not plan.fits:
        raise typer.Exit(FAILED)


def _show(plan: "Plan") -> None:
    console.print(f"{plan.recipe.name} on {plan.gpu.name}", style="bold")
    if learner := plan.learner:
        heads = (name.replace("_", " ") for name in _PARTS)
        table = Table("stage", "ranks", "in flight", *heads, title="learner, GiB of each rank")
        for rank in learner.ranks:
            values = (_gib(getattr(rank, name)) for name in _PARTS)
            first, last = rank.ranks
            table.add_row(str(rank.stage), f"{first}-{last}", str(rank.in_flight), *values)
        console.print(table)
        console.print(
            f"peak {_gib(learner.worst.peak)} GiB of {_gib(plan.gpu.memory)} that tensors may take; "
            f"{len(learner.exported):,} tensors exported, "
            + ("NOT as they should be" if learner.faults else "each once, as transformers has them")
        )
    servers = plan.servers
    console.print(
        f"servers: weights {_gib(servers.weights)} GiB, KV cache {_gib(max(0, servers.kv_cache))} GiB "
        f"= {servers.kv_tokens:,} tokens on each GPU: {servers.running} of the longest sequences at once "
        f"(a step has {servers.wanted} for each server, whose logits are {_gib(servers.logits)} GiB)"
    )
    if times := plan.times:
        console.print(
            f"a step: about {times.step_s:.0f} s (rollout {times.rollout_s:.0f}, score {times.score_s:.0f}, "
            f"update {times.update_s:.0f}, sync {times.sync_s:.1f}), {times.tokens_per_s_per_gpu:,.0f} "
            "tokens/s a GPU; an estimate, for responses of "
            f"{times.breakdown['mean_response_tokens']:,.0f} tokens on average"
        )
        packed, rows = times.packing.packed, times.packing.rows
        console.print(
            f"packing: {packed.share:.1%} of the tokens that the learner runs are padding, in {packed.shapes} "
            f"shapes; with learner.packing: false {rows.share:.1%}, in {rows.shapes} shapes"
        )
        sync, parts = times.sync, times.sync.parts.items()
        console.print(
            f"sync ({plan.recipe.sync.transport}): {sync.senders} learner rank(s) send; each server rank gets "
            f"{_gib(sync.server_rank_bytes)} GiB in {sync.messages} messages, over {sync.groups} groups; "
            + ", ".join(f"{name.replace('_', ' ')} {seconds:.2f} s" for name, seconds in parts)
        )
        console.print(
            f"the learner waits {times.learner_waits_s:.0f} s of it for rollouts, the servers "
            f"{times.servers_wait_s:.0f} s for the learner; one step ahead (rollout.ahead: 1) a step "
            f"takes {times.one_step_off_s:.0f} s"
        )
        if (age := times.breakdown.get("token_age")) is not None:
            console.print(
                f"{plan.recipe.rollout.ahead} steps ahead, simulated: a token is {age:.1f} versions old when "
                f"it is learnt; {times.breakdown['dropped_tokens']:,.0f} a step are dropped as too old"
            )
    for line in plan.warnings:
        console.print(line, style="yellow")
    console.print("fits" if plan.fits else "does not fit", style="bold")
    for line in plan.reasons:
        console.print(f"  {line}")
    for suggestion in plan.suggestions:
        keys = " ".join(f"--set {key}={value}" for key, value in suggestion.changes.items())
        step = f"{suggestion.nodes} nodes, {suggestion.step_s:.0f} s a step"
        gain = "would be faster" if plan.fits else "would fit"
        console.print(f"  {gain} ({step}): {keys}")


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"
