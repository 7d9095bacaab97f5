"""The `fp16rl` command."""

import typer

from megatron_fp16rl.cli import bench, convert, jobs, machine, plan, recipes, rehearse, runs

app = typer.Typer(
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
