"""fp16rl rehearse: a large recipe on a small machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, AsJson, Overrides, console, fail, say
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.tools import recipes

app = typer.Typer()
# Sections whose changes are listed: those that the small run uses.
_RUN_BY = ("model", "rollout", "algorithm", "learner", "precision", "sync", "gates", "warm_start")


@app.command()
def rehearse(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe of any size, or the name of one that ships.")
    ],
    ranks: Annotated[
        int, typer.Option(min=1, help="Most learner ranks to start; no more than needed are.")
    ] = 8,
    overrides: Overrides = None,
    root: Annotated[
        Path | None, typer.Option(help="Where rehearse-NAME/ goes; default: trainer.run_root.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rehearse a large recipe on this machine, which needs no GPU.

    Model, batch and layout are shrunk; algorithm, precision, sync and checkpoints stay, and run through
    the same code: start, two steps, checkpoint, kill -9, resume, export, compare with transformers.
    Takes a minute or two. Prints what was verified and what was changed; keeps all logs.

    Examples:

        fp16rl rehearse recipes/mine.yaml

        fp16rl rehearse recipes/mine.yaml --ranks 4 --set precision=bf16 --json
    """
    from launch import run_folder
    from megatron_fp16rl.checks import check
    from megatron_fp16rl.models.build import model_config
    from megatron_fp16rl.models.spec import check_served, describe
    from megatron_fp16rl.tools.rehearse.run import rehearse as run
    from megatron_fp16rl.tools.rehearse.shrink import shrink

    try:
        full = load(recipes.find(str(recipe)), overrides or [])
        # What no cluster could run is refused here, at full size.
        check(full, partial=True)
        config = model_config(full.model)
        describe(config, full.learner)
        check_served(config)
        run_root = (root or Path(full.trainer.run_root)).resolve()
        folder = run_folder.new_run_folder(run_root, f"rehearse-{full.name}")
        small = shrink(full, config, ranks, folder)
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    except run_folder.Unwritable as error:
        fail(str(error), FAILED)
    say(f"rehearsing {full.name} in {folder}")
    result = {"recipe": full.name, **run(small, folder, say)}
    changed = full.difference(small)
    result["changed"] = {k: pair for k, pair in changed.items() if k.split(".")[0] in _RUN_BY}
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)
    if not result["ok"]:
        fail(f"{full.name}: {result['reason']}", FAILED)


def _show(result: dict[str, Any]) -> None:
    proved = Table("proved", "how", "s")
    for row in result["proved"]:
        proved.add_row(row["what"], row["figure"], f"{row['seconds']:.0f}")
    changed = Table("changed for the rehearsal", "recipe", "rehearsal")
    for key, pair in result["changed"].items():
        changed.add_row(key, *map(str, pair))
    console.print(proved)
    console.print(changed)
    console.print(f"{result['seconds']:.0f} s; everything is in {result['folder']}")
