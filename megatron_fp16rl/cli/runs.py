"""fp16rl train, eval, report: start a run, and look at one."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from launch import outcome, run_folder
from launch import status as statuses
from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Name,
    Overrides,
    Resume,
    console,
    fail,
    load_recipe,
    recipe_file,
    resumable,
    say,
    settings_of,
    table,
)
from megatron_fp16rl.recipe import Dtype
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.terminal import Console, printable

app = typer.Typer()
_FOLLOW_S = 10  # between looks at a run whose page is watched; drawing it takes a second
_Count = Annotated[int, typer.Option(min=1)]


@app.command()
@dropped_if_unread()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, or the name of one that ships.")
    ] = None,
    overrides: Overrides = None,
    name: Name = None,
    resume: Resume = None,
    at: Annotated[
        int | None, typer.Option(help="With --resume: go back to the checkpoint at this step.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Exit with 1 if a gate of the recipe is broken at the end."),
    ] = False,
) -> None:
    """Run a recipe on this machine, or go on with a run that was stopped.

    Starts rollout servers and learner ranks, and stops them all whatever happens. Everything the
    run writes is in runs/NAME/. Ranks that die or hang are started again from the last checkpoint.
    Ctrl-C and SIGTERM end the run now; SIGUSR1 at the end of its step, saved.

    Examples:

        fp16rl train recipes/tiny/dense-grpo-fp16.yaml

        fp16rl train recipes/tiny/dense-grpo-fp16.yaml --set trainer.steps=3 --set precision=bf16

        fp16rl train recipes/tiny/moe-grpo-fp16.yaml --check

        fp16rl train --resume runs/tiny-dense-grpo-fp16 --set trainer.steps=300
    """
    from launch import local
    from megatron_fp16rl.tools.report.page import write_report

    if at is not None and resume is None:
        fail("--at goes with --resume RUN_DIRECTORY", BAD_RECIPE)
    resolved = load_recipe(recipe_file(recipe, resume), settings_of(overrides, name))
    if resume is None:
        run_root = Path(resolved.trainer.run_root)
        folder = run_folder.new_run_folder(run_root, resolved.name).resolve()
    else:
        statuses.check_free(*statuses.read([resume.resolve()]))
        with run_folder.writable(resume):
            folder = resumable(resume.resolve(), at)
    console.print(Text.assemble((resolved.name, "bold"), f" {printable(resolved.description)}"))
    console.print(f"run directory: {folder}")
    try:
        ended = local.run(resolved, folder, lambda line: console.print(line, style="dim"))
    except KeyboardInterrupt:
        fail(f"interrupted; what was done so far is in {folder}", FAILED)
    if ended == outcome.STOPPED:
        console.print(f"stopped; to go on: fp16rl train --resume {folder}")
        return
    summary = json.loads((folder / "summary.json").read_text())
    report = write_report(folder, say) if summary["steps"] else None
    _print_summary(summary, folder, report)
    if check and summary["gates_broken"]:
        raise typer.Exit(FAILED)


@app.command("eval")
def evaluate(
    subject: Annotated[Path, typer.Argument(help="A run directory, or a Hugging Face folder.")],
    suite: Annotated[
        list[str],
        typer.Option(help="FILE:METRIC: avg@K, pass@K or greedy; several times."),
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="Whose task a model is asked; default: the run's own.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a response; default: the recipe's, or 1024.")
    ] = None,
    problems: Annotated[
        int | None, typer.Option(min=1, help="Ask at most so many of each suite.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the recipe's, or fp16.")] = None,
    servers: _Count = 1,
    tensor_parallel: _Count = 1,
    out: Annotated[
        Path | None, typer.Option(help="Where responses go; default: RUN/eval, or evals/MODEL.")
    ] = None,
    perfectible: Annotated[
        Path | None,
        typer.Option(help="Write the first suite's problems solved in 20 to 80 % of tries here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model problems, several times each, and say how often it is right.

    Responses are kept: the same command again asks only what has no answer yet.

    Examples:

        fp16rl eval models/r1-1.5b --suite aime.jsonl:avg@32 --temperature 0.6 --top-p 0.95

        fp16rl eval models/r1-1.5b --suite math.jsonl:avg@40 --perfectible perfectible.jsonl
    """
    from megatron_fp16rl.tools import evaluate as tool

    sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_tokens}
    suites = tool.parse_suites(suite, problems=problems, **sampling)
    subject = subject.resolve()
    is_run = (subject / "recipe.yaml").exists()
    model = tool.Subject.find(subject, recipe)
    result = tool.evaluate(
        model,
        suites,
        model.server(dtype, tensor_parallel, seed=0),
        out or (subject / "eval" if is_run else Path("evals") / subject.name),
        Console(stderr=True) if as_json else console,
        servers,
        perfectible,
    )
    if as_json:
        print(json.dumps(result))
    else:
        _print_evaluation(result)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="A run directory, or several to set side by side.")
    ],
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the picture here too.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page; default: RUN/report.html, or A-vs-B.html beside A."
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Write it again while the run goes on; a browser follows."),
    ] = False,
) -> None:
    """Write a page about a run, finished or not: one file to look at or to send.

    Of several runs: their curves on the same axes, how they fared, the keys of their recipes that differ.

    Examples:

        fp16rl report runs/tiny-dense-grpo-fp16

        fp16rl report runs/fp16 runs/bf16 --png fp16-bf16.png

        fp16rl report runs/tiny-dense-grpo-fp16 --watch
    """
    from megatron_fp16rl.tools.report import comparison
    from megatron_fp16rl.tools.report.page import write_report

    folders = list(dict.fromkeys(run.resolve() for run in runs))
    if len(folders) == 1 and watch:
        _follow(folders[0], out, png)
    elif len(folders) == 1:
        console.print(str(write_report(folders[0], say, out, png)))
    elif watch:
        fail("--watch goes with one run", BAD_RECIPE)
    else:
        page = out or comparison.default_file(folders)
        compared = comparison.write(folders, page, png, say)
        names = [run.name for run in compared]
        rows = comparison.results(compared) + comparison.differences(compared)
        console.print(table(("", *names), rows))
        console.print(str(page))


def _follow(run: Path, out: Path | None, png: Path | None) -> None:
    """Writes the page of a run after each of its steps, until its end."""
    from megatron_fp16rl.tools.report.page import write_report

    if not statuses.is_run(run):
        fail(f"{run} is no run's directory", BAD_RECIPE)
    written = 0
    for (status,) in statuses.follow([run], _FOLLOW_S):
        refresh_s = None if status.is_over else _FOLLOW_S
        if status.steps_done > written or status.is_over:
            page = write_report(run, say, out, png, refresh_s)
            if not written:
                console.print(f"{page}: a browser that shows it follows the run")
            written = status.steps_done
    console.print(f"{status.state}: {status.reason}" if status.reason else status.state)


def _print_evaluation(result: dict) -> None:
    rows = [
        (
            row["suite"],
            row["metric"],
            f"{row['value']:.3f}",
            "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
            str(row["problems"]),
            f"{100 * row['truncated_fraction']:.0f} %",
            f"{row['length_mean']:.0f}",
        )
        for row in result["rows"]
    ]
    heads = ("suite", "metric", "value", "95 %", "problems", "truncated", "tokens")
    console.print(table(heads, rows))
    if kept := result.get("perfectible"):
        console.print(f"{kept['problems']} of {kept['of']} problems: {kept['file']}")


def _print_summary(summary: dict, folder: Path, report_path: Path | None) -> None:
    shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in summary["shares"].items())
    mismatch = summary["mismatch_logprob_abs_mean"]
    console.print()
    if summary["accuracy_after"] is None:
        console.print("held-out accuracy: none; nothing is held out, or no server was there to ask")
    else:
        # None before, where nothing was held out, or no server there, until a resume.
        values = (summary["accuracy_before"], summary["accuracy_after"])
        change = " -> ".join("none" if v is None else f"{v:.3f}" for v in values)
        console.print(Text.assemble("held-out accuracy: ", (change, "bold")))
    console.print(f"wall time: {summary['wall_s']:.0f} s for {summary['steps']} steps ({shares})")
    console.print(f"mean |log pi - log mu|: {'n/a' if mismatch is None else f'{mismatch:.1e}'}")
    console.print(f"skipped updates: {summary['skipped_total']}")
    for reason in summary["gates_broken"]:
        console.print(reason, style="yellow")
    console.print(f"model: {folder / 'export'}")
    console.print(f"report: {report_path or 'none, no step was made'}")
