"""fp16rl recipes: those that ship, and forks of them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_fp16rl.checks import check_model
from megatron_fp16rl.cli.common import AsJson, Overrides, console, table
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.tools import recipes

app = typer.Typer(help="The recipes that ship: list, fork, compare.", no_args_is_help=True)
_Recipe = Annotated[str, typer.Argument(help="A recipe: its path, or its name in the list.")]


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship: model, algorithm, nodes, layout, and where the numbers come from.

    The table has a word for each origin; --json has the whole text.

    Example: fp16rl recipes list --json
    """
    rows = recipes.listing()
    if as_json:
        print(json.dumps({"recipes": rows}))
        return
    heads = ("recipe", "B", "algorithm", "nodes", "layout", "numbers from", "layout from", "run")
    cells = []
    for row in rows:
        size, nodes, provenance = row["parameters_b"], row["nodes"], row["provenance"] or {}
        origins = [provenance.get(key, "-") for key in ("algorithm", "layout", "run")]
        of_nodes = "-" if nodes is None else f"{nodes} x {row['gpus_per_node']}"
        billions = "-" if size is None else f"{size:.3g}"
        words = (row["path"].removesuffix(".yaml"), billions, row["algorithm"], of_nodes)
        cells.append((*words, row["layout"], *(o.partition(":")[0] for o in origins)))
    console.print(table(heads, cells))


@app.command("new")
def new_recipe(
    file: Annotated[Path, typer.Argument(help="Where the recipe goes, e.g. mine.yaml")],
    source: Annotated[str, typer.Option("--from", help="The recipe to fork: its path or name.")],
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Of the job; ranks and servers grow with them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face folder or name, for model.path.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a recipe of your own that inherits from another; --set says what else it changes.

    Example: fp16rl recipes new mine.yaml --from qwen3-8b-dapo-fp16-2n8g --nodes 4 --model models/qwen3-8b
    """
    settings = overrides or []
    base = recipes.find(source)
    if model is not None:
        path = str(Path(model).resolve()) if Path(model).is_dir() else model
        settings = [*settings, setting("model.path", path)]
    if nodes is not None:
        settings = [*settings, *recipes.on_nodes(base, settings, nodes)]
    recipe = recipes.new(file, base, settings)
    try:
        check_model(recipe, partial=True)
    except RecipeError as error:  # e.g. another model needs another template
        console.print(f"to be changed in {file}: {error}")
    console.print(f"whether it fits: fp16rl plan {file}")


@app.command("diff")
def diff_recipes(one: _Recipe, other: _Recipe, as_json: AsJson = False) -> None:
    """Say what differs between two recipes after all that they inherit is filled in.

    Example: fp16rl recipes diff qwen3-8b-dapo-fp16-2n8g mine.yaml
    """
    left, right = (load(recipes.find(name)) for name in (one, other))
    differences = left.difference(right)
    if as_json:
        print(json.dumps({"differences": {key: list(pair) for key, pair in differences.items()}}))
        return
    rows = [(key, *map(str, pair)) for key, pair in differences.items()]
    console.print(table(("key", one, other), rows) if rows else "no difference")
