"""What the commands share."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from megatron_fp16rl.checks import check
from megatron_fp16rl.recipe import Recipe, RecipeError, load
from megatron_fp16rl.tools import recipes
from megatron_fp16rl.utils import output
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.terminal import Console, printable

FAILED, BAD_RECIPE = 1, 2

output.open_closed()
console = Console()
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. trainer.steps=3."),
]


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The resolved recipe, its model, template, data and reward checked too; ends the program if it cannot be used.

    path: or the name of a recipe that ships.
    """
    try:
        recipe = load(recipes.find(str(path)), overrides)
        check(recipe)
    except RecipeError as error:
        fail(f"{error}{_as_last_started(path)}", BAD_RECIPE)
    return recipe


def _as_last_started(recipe: Path) -> str:
    """Of a run's recipe that is damaged or gone: where there is another."""
    from launch import outcome

    return outcome.recipe_remedy(recipe.parent) if recipe.name == "recipe.yaml" else ""


def resumable(folder: Path, at: int | None = None) -> Path:
    """The directory of a run that has a checkpoint to go on from; ends the program if not."""
    from megatron_fp16rl.learner import checkpoint_files

    saved = folder / "checkpoints"
    try:
        if at is not None:
            checkpoint_files.set_aside_after(saved, at)
        found = checkpoint_files.available(saved)
        if not found:
            fail(f"{saved} holds no checkpoint: start the recipe anew", FAILED)
        # The run itself looks closer, and leaves out what is damaged.
        whole = next((c for c in found if not c.faults()), None)
        if whole is None or (at is not None and whole != found[0]):
            raise checkpoint_files.refusal(found[0], found[0].faults())
    except checkpoint_files.CheckpointError as error:
        fail(str(error), FAILED)
    return folder


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Ends the program with the message of an ExplainedError, without a traceback."""
    try:
        yield
    except ExplainedError as error:
        fail(str(error), BAD_RECIPE if isinstance(error, RecipeError) else FAILED)


def fail(message: str, code: int) -> NoReturn:
    say(f"error: {message}")
    raise typer.Exit(code)


def say(line: str) -> None:
    """Progress, or an error: no result."""
    print(printable(line), file=sys.stderr, flush=True)


def show_job(job: dict, as_json: bool) -> None:
    """Says what became of a command that was to be a job; see launch/command.py."""
    if as_json:
        print(json.dumps(job))
        return
    console.print(f"script: {job['script']}")
    console.print(f"Slurm says: {job.get('check', 'nothing, sbatch is not here')}")
    for number in job["jobs"]:
        console.print(f"job {number}; its output: {job['output']}")
