"""Shared by the commands: options, loading, and how a command ends."""

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.table import Table

from launch import outcome, status
from megatron_fp16rl.checks import check
from megatron_fp16rl.recipe import Recipe, RecipeError, load
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.tools import recipes
from megatron_fp16rl.utils import output
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.terminal import Console, printable

T = TypeVar("T")
FAILED, BAD_RECIPE = 1, 2

output.open_closed()
console = Console()
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Name = Annotated[str | None, typer.Option(help="Name of the run; default: the recipe's.")]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="RUN_DIRECTORY", help="Resume this run from its newest checkpoint."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. trainer.steps=3."),
]


def recipe_file(recipe: Path | None, resume: Path | None) -> Path:
    """The recipe that a command was given, or that of the run to resume. It takes one of the two."""
    source = recipe if resume is None else resume / "recipe.yaml"
    if source is None or (recipe and resume):
        fail("give either a recipe or --resume RUN_DIRECTORY", BAD_RECIPE)
    if resume is not None and not status.is_run(resume):
        fail(f"{resume} is no run's directory: it has no {status.RECIPE_FILE}", BAD_RECIPE)
    return source


def settings_of(overrides: list[str] | None, name: str | None) -> list[str]:
    """Overrides of a recipe; --name is one of them."""
    return [*(overrides or []), *([] if name is None else [setting("name", name)])]


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The resolved recipe of a file, or of a name that ships; model, data and reward are checked too."""
    try:
        recipe = load(recipes.find(str(path)), overrides)
        check(recipe)
    except RecipeError as error:
        is_run = path.name == "recipe.yaml"
        raise RecipeError(
            f"{error}{outcome.recipe_remedy(path.parent) if is_run else ''}"
        ) from None
    return recipe


def resumable(folder: Path, at: int | None = None) -> Path:
    """The directory of a run, after a look whether it has a checkpoint to resume from.

    at: the step to go back to; checkpoints of later steps are set aside. Raises CheckpointError.
    """
    from megatron_fp16rl.learner import checkpoint_files

    checkpoints = folder / "checkpoints"
    if at is not None:
        checkpoint_files.set_aside_after(checkpoints, at)
    available = checkpoint_files.available(checkpoints)
    if not available:
        fail(f"{checkpoints} holds no checkpoint: start the recipe anew", FAILED)
    # A cheap look: the run itself checks digests, and leaves out what is damaged.
    usable = next((each for each in available if not each.faults()), None)
    if usable is None or (at is not None and usable != available[0]):
        raise checkpoint_files.refusal(available[0], available[0].faults())
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


def names(known: Collection[T], text: str, option: str) -> list[T]:
    """The names in a list such as "fp16,bf16", each once."""
    by_name = {str(name): name for name in known}
    chosen = dict.fromkeys(name.strip() for name in text.split(","))
    for name in chosen:
        if name not in by_name:
            fail(
                f"{option} {text}: there is no {name!r}; there are {', '.join(by_name)}", BAD_RECIPE
            )
    return [by_name[name] for name in chosen]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], **style: Any) -> Table:
    """A table of text."""
    made = Table(*heads, **style)
    for row in rows:
        made.add_row(*row)
    return made


def say(line: str) -> None:
    """Prints progress or an error, to stderr: stdout is for results."""
    print(printable(line), file=sys.stderr, flush=True)
