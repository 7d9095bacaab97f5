"""fp16rl rehearse: a large recipe on a small machine."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, AsJson, Overrides, console, fail, say
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.tools import recipes

app = typer.Typer()


@app.command()
def rehearse(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe of whatever size, or the name of one that ships.")
    ],
    ranks: Annotated[
        int, typer.Option(min=1, help="At most so many learner ranks; no more than needed.")
    ] = 8,
    overrides: Overrides = None,
    root: Annotated[
        Path | None, typer.Option(help="Where rehearse-NAME/ goes; default: trainer.run_root.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rehearse a large recipe on this machine, which needs no GPU.

    Model, batch and layout are shrunk; algorithm, precision, sync, checkpoint and the rest stay, and
    run through the same code: start, two steps, checkpoint, kill -9, resume, export, compare with
    transformers. Takes a minute or two. What was proved, and what only GPUs can prove, is printed; all
    logs are kept.

    Examples:

        fp16rl rehearse recipes/mine.yaml

        fp16rl rehearse recipes/mine.yaml --ranks 4 --set precision=bf16 --json
    """
    from launch import local
    from megatron_fp16rl.checks import check
    from megatron_fp16rl.models.build import model_config
    from megatron_fp16rl.models.families import check_served, describe
    from megatron_fp16rl.tools.rehearse.run import rehearse as run
    from megatron_fp16rl.tools.rehearse.shrink import shrink

    try:
        full = load(recipes.find(str(recipe)), overrides or [])
        check(full, partial=True)
        config = model_config(full.model)
        describe(config, full.learner)
        check_served(config)
        where = (root or Path(full.trainer.run_root)).resolve()
        folder = local.new_run_folder(where, f"rehearse-{full.name}")
        small = shrink(full, config, ranks, folder)
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    except local.Unwritable as error:
        fail(str(error), FAILED)
    say(f"rehearsing {full.name} in {folder}")
    result = run(small, folder, say)
    answer = {"recipe": full.name, **result.as_json()}
    if as_json:
        print(json.dumps(answer))
    else:
        _show(answer)
    if not answer["ok"]:
        fail(f"{full.name}: {answer['reason']}", FAILED)


def _show(answer: dict) -> None:
    proved = Table("proved", "how", "s")
    for row in answer["proved"]:
        proved.add_row(row["what"], row["figure"], f"{row['seconds']:.0f}")
    folded = Table("folded", "recipe", "here")
    for row in answer["folded"]:
        folded.add_row(row["what"], str(row["full"]), str(row["here"]))
    console.print(proved)
    console.print(folded)
    for title, lines in (
        ("not rehearsed, or otherwise", answer["left_out"]),
        ("only GPUs can prove", answer["only_gpus"]),
    ):
        console.print(title, style="bold")
        for line in lines:
            console.print(f"  {line}")
    console.print(f"{answer['seconds']:.0f} s; everything is in {answer['folder']}")
