"""fp16rl rehearse: a large recipe on a small machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.run_folder import new_run_folder
from megatron_fp16rl.cli.common import FAILED, AsJson, Overrides, console, fail, say, table
from megatron_fp16rl.recipe import load
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
    from megatron_fp16rl.checks import check
    from megatron_fp16rl.models.build import model_config
    from megatron_fp16rl.models.spec import check_served, describe
    from megatron_fp16rl.tools.rehearse.run import rehearse as run
    from megatron_fp16rl.tools.rehearse.shrink import shrink

    full = load(recipes.find(str(recipe)), overrides or [])
    # What no cluster could run is refused here, at full size.
    check(full, partial=True)
    config = model_config(full.model)
    describe(config, full.learner)
    check_served(config)
    run_root = (root or Path(full.trainer.run_root)).resolve()
    folder = new_run_folder(run_root, f"rehearse-{full.name}")
    small = shrink(full, config, ranks, folder)
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
    proved = [(row["what"], row["figure"], f"{row['seconds']:.0f}") for row in result["proved"]]
    console.print(table(("proved", "how", "s"), proved))
    changed = [(key, *map(str, pair)) for key, pair in result["changed"].items()]
    console.print(table(("changed for the rehearsal", "recipe", "rehearsal"), changed))
    console.print(f"{result['seconds']:.0f} s; everything is in {result['folder']}")
