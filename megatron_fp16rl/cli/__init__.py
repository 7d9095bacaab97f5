"""The `fp16rl` command."""

from typing import Any

import typer
from typer.core import TyperGroup

from megatron_fp16rl.cli import bench, convert, jobs, machine, plan, recipes, rehearse, runs
from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, fail
from megatron_fp16rl.errors import FinalError
from megatron_fp16rl.recipe import RecipeError


class _Explained(TyperGroup):
    """Commands whose errors that a message explains end the program with it, and no traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FinalError as error:
            fail(str(error), BAD_RECIPE if isinstance(error, RecipeError) else FAILED)
        except OSError as error:
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}", FAILED)


app = typer.Typer(
    cls=_Explained,
    help="FP16 reinforcement learning of language models: Megatron-core learners, SGLang rollouts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for topic in (runs, plan, rehearse, jobs, machine):
    app.add_typer(topic.app)
app.add_typer(bench.app, name="bench")
app.add_typer(convert.app, name="convert")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Runs the command line."""
    app()
