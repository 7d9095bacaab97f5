"""fp16rl recipes: the catalogue, and forks of what is in it."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from megatron_fp16rl.checks import check_model
from megatron_fp16rl.cli.common import BAD_RECIPE, AsJson, console, fail
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.tools import recipes

app = typer.Typer(help="The recipes that ship: list, fork, compare.", no_args_is_help=True)
Where = Annotated[str, typer.Argument(help="A recipe: its path, or its name in the list.")]


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship: model, algorithm, nodes, layout, and where the numbers come from.

    Said of them in a word here, and whole with --json.

    Example: fp16rl recipes list --json
    """
    rows = []
    for entry in recipes.entries():
        recipe, slurm = entry.recipe, entry.recipe.slurm
        provenance = recipe.provenance
        rows.append(
            {
                "name": recipe.name,
                "path": entry.path,
                "model": recipe.model.path or "built here",
                "parameters_b": None if entry.billions is None else round(entry.billions, 6),
                "algorithm": recipes.algorithm_in_short(recipe.algorithm),
                "nodes": recipes.nodes(recipe),
                "gpus_per_node": slurm.gpus_per_node if slurm else None,
                "layout": recipes.layout_in_short(recipe.learner),
                "provenance": provenance.model_dump() if provenance else None,
            }
        )
    if as_json:
        print(json.dumps({"recipes": rows}))
        return
    table = Table(
        "recipe", "B", "algorithm", "nodes", "layout", "numbers from", "layout from", "run"
    )
    for row in rows:
        origin = row["provenance"] or {"algorithm": "-", "layout": "-", "run": "-"}
        size = "-" if row["parameters_b"] is None else f"{row['parameters_b']:.3g}"
        where = "-" if row["nodes"] is None else f"{row['nodes']} x {row['gpus_per_node']}"
        kinds = (text.partition(":")[0] for text in origin.values())
        cells = (
            row["path"].removesuffix(".yaml"),
            size,
            row["algorithm"],
            where,
            row["layout"],
            *kinds,
        )
        table.add_row(*map(str, cells))
    console.print(table)


@app.command("new")
def new_recipe(
    file: Annotated[Path, typer.Argument(help="Where the recipe goes, e.g. mine.yaml")],
    source: Annotated[str, typer.Option("--from", help="The recipe to fork: its path or name.")],
    nodes: Annotated[
        int | None, typer.Option(min=1, help="In all; replicas and servers become more or fewer.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face folder, or a name in the local cache.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of its runs; default: the file's.")] = None,
) -> None:
    """Write a recipe of your own that inherits from another.

    Example: fp16rl recipes new mine.yaml --from qwen3-8b-dapo-fp16-2n8g --nodes 4 --model models/qwen3-8b
    """
    try:
        made = recipes.fork(file, recipes.find(source), name, nodes, model)
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    slurm = made.slurm
    where = f", {recipes.nodes(made)} nodes x {slurm.gpus_per_node} GPUs" if slurm else ""
    console.print(f"{file}: {recipes.layout_in_short(made.learner)}{where}")
    if model is not None and made.model.shape is not None:
        console.print(
            f"{made.model.path} is not here: plans and rehearsals take {made.model.shape} for its "
            "config.json; if it has another, give that as model.shape",
        )
    try:
        check_model(made, partial=True)
    except RecipeError as error:  # another model is asked otherwise
        console.print(f"to be changed in {file}: {error}")
    console.print(f"whether it fits: fp16rl plan {file}")


@app.command("diff")
def diff_recipes(one: Where, other: Where, as_json: AsJson = False) -> None:
    """Say what differs between two recipes after all that they inherit is filled in.

    Example: fp16rl recipes diff qwen3-8b-dapo-fp16-2n8g mine.yaml
    """
    try:
        left, right = (load(recipes.find(name)) for name in (one, other))
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    found = recipes.difference(left, right)
    if as_json:
        print(json.dumps({"differences": {key: list(pair) for key, pair in found.items()}}))
        return
    table = Table("key", one, other)
    for key, pair in found.items():
        table.add_row(*map(str, (key, *pair)))
    console.print(table if found else "no difference")
