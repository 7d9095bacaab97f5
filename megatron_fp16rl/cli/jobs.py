"""fp16rl submit, status, cancel: runs as jobs of a cluster, and how runs fare."""

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from megatron_fp16rl.cli import status_table
from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Overrides,
    console,
    fail,
    load_recipe,
    resumable,
)
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.utils.terminal import Console, printable

if TYPE_CHECKING:
    from launch.status import Status

app = typer.Typer()
Root = Annotated[Path, typer.Option(help="Where runs are looked for by name.")]
_EVERY_S = 2.0


@app.command()
def submit(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe with a slurm: section")] = None,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: the recipe's.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIRECTORY", help="Go on with this run from its newest checkpoint."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the script, check it, submit nothing.")
    ] = False,
    chain: Annotated[
        int, typer.Option(min=1, help="Jobs one after the other, each going on where one ended.")
    ] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2", help="A run for each value; several times: for each pair."
        ),
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(min=1, help="With --sweep: so many runs at a time.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Submit it even if fp16rl plan says that it does not fit."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a recipe into Slurm's queue, or a run that has ended. Its directory holds the script, job.sbatch.

    A recipe for GPUs is planned first (fp16rl plan), and refused if it does not fit.

    Examples:

        fp16rl submit recipes/mine.yaml --dry-run

        fp16rl submit recipes/mine.yaml --set slurm.time=12:00:00 --chain 3

        fp16rl submit recipes/mine.yaml --sweep learner.optimizer.lr=1e-6,3e-6 --sweep trainer.seed=0,1,2

        fp16rl submit --resume runs/mine --set slurm.options.exclude=node7
    """
    if (recipe is None) == (resume is None):
        fail("give either a recipe or --resume RUN_DIRECTORY", BAD_RECIPE)
    if sweep and (chain > 1 or resume is not None):
        fail(f"{'--chain' if chain > 1 else '--resume'} does not go with --sweep", BAD_RECIPE)
    if max_running and not sweep:
        fail("--max-running goes with --sweep", BAD_RECIPE)
    from launch import sweep as sweeps

    settings = [*(overrides or []), *([setting("name", name)] if name else [])]
    plans: list[str] = []
    plan = (lambda recipes: None) if force else (lambda recipes: _plan(recipes, plans))
    resumed = None
    if resume is not None:
        folder, resumed = _resumed(resume, settings)
        plan([resumed])
    elif recipe is not None:
        folder = _write(recipe, settings, sweep or [], max_running, chain > 1, plan)
    runs = sweeps.runs(folder)
    result = {"script": "", "jobs": [], "runs": [str(r) for r in runs or [folder]], "plan": plans}
    _queue(result, folder, resumed, chain, dry_run)
    if as_json:
        print(json.dumps(result))
        return
    for line in plans:
        console.print(line)
    console.print(f"script: {result['script']}" + (f", for {len(runs)} runs" if runs else ""))
    console.print(f"Slurm says: {result.get('check', 'nothing, sbatch is not here')}")
    for job in result["jobs"]:
        console.print(f"job {job}; what becomes of it: fp16rl status {folder}")


def _write(
    path: Path,
    settings: list[str],
    axes: list[str],
    max_running: int | None,
    chain: bool,
    plan: Callable[[Iterable[Recipe]], None],
) -> Path:
    """Makes the directory of a run or a sweep, with its script. All recipes are checked before that."""
    from launch import batch_script, run_folder, sweep

    recipe = load_recipe(path, settings)
    if recipe.slurm is None:
        fail(f"{path}: {batch_script.NO_SECTION}", BAD_RECIPE)
    root = Path(recipe.trainer.run_root)
    if axes:
        recipes = {}
        for label, values in sweep.points([sweep.Axis.parse(text) for text in axes]):
            run_name = setting("name", f"{recipe.name}.{label}")
            recipes[label] = load_recipe(path, [*settings, *values, run_name])
        plan(recipes.values())
        return sweep.write(recipes, root, recipe.name, max_running)
    plan([recipe])
    folder = run_folder.new_run_folder(root, recipe.name).resolve()
    batch_script.write(recipe, folder, chain)
    return folder


def _resumed(resume: Path, settings: list[str]) -> tuple[Path, Recipe]:
    """The directory and the recipe of a run that a job can go on with."""
    from launch import batch_script
    from launch import status as statuses

    file = resume / statuses.RECIPE_FILE
    if not statuses.is_run(resume):
        fail(f"{resume} is no run's directory: it has no {file.name}", BAD_RECIPE)
    folder = resume.resolve()
    recipe = load_recipe(folder / file.name, settings)
    if recipe.slurm is None:
        fail(f"{folder / file.name}: {batch_script.NO_SECTION}", BAD_RECIPE)
    (seen,) = statuses.read([folder])
    if seen.slurm_error and not seen.is_over:
        fail(f"whether a job has {folder} already is not known: {seen.slurm_error}", FAILED)
    statuses.check_free(seen)
    return resumable(folder), recipe


def _queue(
    result: dict[str, Any], folder: Path, resumed: Recipe | None, chain: int, dry_run: bool
) -> None:
    """Has Slurm check the script, then puts it into the queue.

    result: gets the script, Slurm's answer and the jobs. resumed: the recipe of a run that goes on; its
    own script is replaced only when Slurm takes the new one.
    """
    from launch import batch_script, slurm, sweep
    from launch.run_folder import writable

    script = folder / batch_script.SCRIPT
    try:
        with writable(folder):
            if resumed is not None:
                script = batch_script.write_draft(resumed, folder, chain > 1)
            if slurm.available() or not dry_run:
                result["check"] = slurm.check(script)
            if not dry_run:
                if resumed is not None:
                    script = batch_script.write(resumed, folder, chain > 1)
                swept = sweep.runs(folder)
                for _ in range(chain):
                    result["jobs"].append(sweep.submit(folder) if swept else slurm.submit(script))
    except slurm.SlurmError as error:
        queued = [f"\njob {job} is in the queue" for job in result["jobs"]]
        fail(f"{error}{''.join(queued)}\nthe script is {script}", FAILED)
    result["script"] = str(script)


def _plan(recipes: Iterable[Recipe], lines: list[str]) -> None:
    """Plans recipes for GPUs, a line each; ends the program if one does not fit."""
    from megatron_fp16rl.tools.plan.submission import distinct, plan_of

    for recipe in distinct(recipes):
        if recipe.slurm is None or not recipe.slurm.gpus_per_node:
            continue  # the nodes' memory is not known
        with Console(stderr=True).status(Text(f"planning {recipe.name}"), spinner="dots"):
            plan: dict[str, Any] | None = plan_of(recipe)
        if plan is None:
            lines.append(
                f"{recipe.name} was not planned: its model is not here, and it has no shape"
            )
            continue
        lines += [f"{recipe.name}: {warning}" for warning in plan["warnings"]]
        if not plan["fits"]:
            message = [f"{recipe.name} does not fit: {'; '.join(plan['reasons'])}"]
            for change in plan["suggestions"]:
                keys = " ".join(f"--set {key}={value}" for key, value in change["changes"].items())
                message.append(f"it would with: {keys}")
            fail("\n".join([*message, "to submit it all the same: --force"]), FAILED)
        lines.append(
            f"{recipe.name} fits: {plan['peak_gib']:.1f} GiB of {plan['usable_gib']:.1f} at the most; a "
            f"step may take {plan['step_s']:.0f} s"
        )


@app.command()
def status(
    what: Annotated[
        str | None,
        typer.Argument(help="A run or a sweep, by directory or name, or a job's number."),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Follow until the end. Exit code 0 if all is done, else 1."),
    ] = False,
    root: Root = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Say how far a run is and how it fares, or list all runs.

    Examples:

        fp16rl status

        fp16rl status tiny-dense-grpo-fp16 --watch

        fp16rl status 4711 --json
    """
    from launch import outcome
    from launch import status as statuses

    folder = root if what is None else statuses.find(what, root)
    runs, one = statuses.all_runs(folder), statuses.is_run(folder)
    show = status_table.of_one if one else status_table.of_all
    if not watch:
        seen = statuses.read(runs)
        if not as_json:
            console.print(show(seen))
    elif as_json:
        *_, seen = statuses.follow(runs, _EVERY_S)
    else:
        seen = _watch(statuses.follow(runs, _EVERY_S), show)
    if as_json:
        values = [asdict(status) for status in seen]
        print(json.dumps(values[0] if one else {"runs": values}))
    if watch and any(status.state != outcome.DONE for status in seen):
        raise typer.Exit(FAILED)


def _watch(
    updates: Iterable[list["Status"]], show: Callable[[list["Status"]], RenderableType]
) -> list["Status"]:
    """Shows each update in the place of the one before; without a terminal, a line for each change."""
    printed: dict[str, str] = {}
    live = Live(console=console, auto_refresh=False) if sys.stdout.isatty() else None
    with live or nullcontext():
        for statuses in updates:
            if live:
                live.update(show(statuses), refresh=True)
                continue
            for status in statuses:
                if printed.get(status.run) != (line := status_table.line(status)):
                    printed[status.run] = line
                    print(printable(line), flush=True)
    return statuses


@app.command()
def cancel(
    what: Annotated[
        str, typer.Argument(help="A run or a sweep, by directory or name, or a job's number.")
    ],
    save: Annotated[
        bool, typer.Option("--save", help="End after the step, with a checkpoint to go on from.")
    ] = False,
    root: Root = Path("runs"),
) -> None:
    """End a run, here or in Slurm: all its jobs, and all runs of a sweep.

    Examples:

        fp16rl cancel tiny-dense-grpo-fp16 --save

        fp16rl cancel 4711
    """
    from launch import status as statuses

    done = statuses.cancel(statuses.find(what, root), save)
    for line in done:
        console.print(line)
    if not done:
        fail(f"nothing works on {what}; see fp16rl status {what}", FAILED)
