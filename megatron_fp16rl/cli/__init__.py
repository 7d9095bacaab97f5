"""The `fp16rl` command."""

import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from megatron_fp16rl.cli import (
    bench,
    convert,
    jobs,
    machine,
    plan,
    recipes,
    rehearse,
    runs,
    selftest,
)
from megatron_fp16rl.cli.common import FAILED, explained, fail
from megatron_fp16rl.utils import output
from megatron_fp16rl.utils.files import is_full
from megatron_fp16rl.utils.processes import die_with_parent


class _Explained(TyperGroup):
    """Commands that end with an error's message where that suffices, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with explained():
                result = super().invoke(ctx)
            sys.stdout.flush()  # a closed or full stdout shows here, not at exit
            return result
        except RuntimeError as error:  # of Path.resolve, up to Python 3.12
            if not str(error).startswith("Symlink loop"):
                raise
            fail(f"{error}: name the place itself", FAILED)
        except OSError as error:
            if error.filename is not None:
                fail(f"{error.filename}: {error.strerror}", FAILED)
            output.abandon(sys.stdout)
            if isinstance(error, BrokenPipeError):  # `| head`: a quiet end, as for any Unix tool
                raise typer.Exit(128 + signal.SIGPIPE) from None
            if is_full(error):
                fail(f"the output cannot be written: {error.strerror}", FAILED)
            raise


app = typer.Typer(
    cls=_Explained,
    help="FP16 reinforcement learning of language models: Megatron-core learners, SGLang rollouts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for topic in (runs, plan, rehearse, jobs, machine, selftest):
    app.add_typer(topic.app)
app.add_typer(bench.app, name="bench")
app.add_typer(convert.app, name="convert")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Runs the command line."""
    die_with_parent()  # of a rehearsal, which starts commands as its children
    app()
