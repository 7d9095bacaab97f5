"""fp16rl plan: whether a recipe fits, and how long a step takes, before anything is queued."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, AsJson, Overrides, console, fail
from megatron_fp16rl.recipe import Gpu, RecipeError, load

if TYPE_CHECKING:
    from megatron_fp16rl.planner.plan import Plan

app = typer.Typer()
_DEFAULT_GPU = "h100-80gb"


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe of whatever size.")],
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Plan it for so many nodes, learner and rollout together."),
    ] = None,
    gpu: Annotated[Gpu | None, typer.Option(help="Default: slurm.gpu of the recipe.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a recipe fits its GPUs, what it takes and how long a step may last.

    Nothing is computed and no GPU is needed: every pipeline stage is built by Megatron-core itself, at
    the recipe's true size, on a device that holds no values. Exit code 1 if it does not fit; changes with
    which it would are looked for. How figures are made, and how good they are: docs/planner.md.

    Examples:

        fp16rl plan recipes/dense/qwen3-14b-base-dapo-fp16-4n8g.yaml

        fp16rl plan recipes/mine.yaml --nodes 8 --gpu h200 --set learner.micro_batch_tokens=16384 --json
    """
    from megatron_fp16rl import catalogue
    from megatron_fp16rl.planner.plan import as_json as to_json
    from megatron_fp16rl.planner.plan import plan

    try:
        wanted = load(recipe, overrides or [])
        if nodes is not None:
            wanted = catalogue.on_nodes(wanted, nodes)
        kind = gpu or (wanted.slurm.gpu if wanted.slurm else _DEFAULT_GPU)
        with Console(stderr=True).status("", spinner="dots") as status:
            found = plan(wanted, kind, status.update)
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    if as_json:
        print(json.dumps(to_json(found)))
    else:
        _show(found)
    if not found.fits:
        raise typer.Exit(FAILED)
