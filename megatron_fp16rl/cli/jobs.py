"""fp16rl submit, status, cancel: runs as jobs of a cluster, and how runs fare."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from launch import batch_script, outcome, run_folder, slurm
from launch import status as statuses
from launch import sweep as sweeps
from launch.status import Status
from megatron_fp16rl.cli import status_table
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
)
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.terminal import Console

app = typer.Typer()
Root = Annotated[Path, typer.Option(help="Where runs are looked for by name.")]
_EVERY_S = 2.0


@app.command()
def submit(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe with a slurm: section")] = None,
    overrides: Overrides = None,
    name: Name = None,
    resume: Resume = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the script, check it, submit nothing.")
    ] = False,
    chain: Annotated[
        int, typer.Option(min=1, help="Jobs one after the other, each resuming where one ended.")
    ] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="A run a value; several times: a run a pair."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even if it does not fit.")] = False,
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
    if sweep and (chain > 1 or resume is not None):
        fail(f"{'--chain' if chain > 1 else '--resume'} does not go with --sweep", BAD_RECIPE)
    # All recipes are checked, and planned, before the first directory is made.
    settings = settings_of(overrides, name)
    base = _checked(recipe, resume, settings)
    recipes = {base.name: base}
    if sweep and recipe:
        recipes = _points(recipe, settings, base.name, sweep)
    plan = [] if force else _plan(recipes.values())
    root = Path(base.trainer.run_root)
    for label, each in recipes.items():  # what no script can hold
        batch_script.render(each, (resume or root / label).absolute(), chain > 1)
    if sweep:
        root = sweeps.new_folder(root, base.name, sweep)
    folders = {
        (resume or run_folder.new_run_folder(root, label)).resolve(): each
        for label, each in recipes.items()
    }
    result = _queue(folders, resume is not None, chain, dry_run)
    if as_json:
        print(json.dumps({**result, "plan": plan}))
        return
    lines = [*plan, f"script: {result['script']}" + (f", for {len(recipes)} runs" if sweep else "")]
    lines.append(f"Slurm says: {result.get('check', 'nothing, sbatch is not here')}")
    shown = root if sweep else result["runs"][0]
    for line in [*lines, *(f"job {job}: fp16rl status {shown}" for job in result["jobs"])]:
        console.print(line)


def _points(recipe: Path, settings: list[str], name: str, sweep: list[str]) -> dict[str, Recipe]:
    """The recipes of a sweep, by the names of its points."""
    return {
        label: load_recipe(recipe, [*settings, *point, setting("name", f"{name}.{label}")])
        for label, point in sweeps.points(sweep).items()
    }


def _checked(recipe: Path | None, resume: Path | None, settings: list[str]) -> Recipe:
    """The recipe to submit, which has a slurm section, and whose run nobody works on."""
    source = recipe_file(recipe, resume)
    base = load_recipe(source, settings)
    if base.slurm is None:
        fail(f"{resume or recipe}: {batch_script.NO_SECTION}", BAD_RECIPE)
    if resume:
        (status,) = statuses.read([resume.resolve()])
        if status.slurm_error and not status.is_over:
            fail(f"whether a job has {resume} already is not known: {status.slurm_error}", FAILED)
        statuses.check_free(status)
        resumable(resume.resolve())
    return base


def _queue(runs: dict[Path, Recipe], resumes: bool, chain: int, dry_run: bool) -> dict[str, Any]:
    """Writes a script into each run's directory, has Slurm check it, and submits it.

    Returns script, runs, jobs and Slurm's answer. A run that resumes keeps its own recipe and script until
    Slurm has taken the new ones.
    """
    result: dict[str, Any] = {"script": "", "jobs": [], "runs": [str(folder) for folder in runs]}
    for folder, recipe in runs.items():
        script = folder / (batch_script.DRAFT if resumes else batch_script.SCRIPT)
        try:
            with run_folder.writable(folder):
                text = batch_script.render(recipe, folder, chain > 1)
                if resumes:
                    write_text(script, text)
                else:
                    batch_script.write(recipe, folder, chain > 1)
                if slurm.available() or not dry_run:
                    result["check"] = slurm.check(text)
                if resumes and not dry_run:
                    script.unlink()
                    script = batch_script.write(recipe, folder, chain > 1)
                result["script"] = str(script)
                for _ in range(0 if dry_run else chain):
                    result["jobs"].append(slurm.submit(script))
        except slurm.SlurmError as error:
            queued = [f"\njob {job} is in the queue" for job in result["jobs"]]
            fail(f"{error}{''.join(queued)}\nthe script is {script}", FAILED)
    return result


def _plan(recipes: Iterable[Recipe]) -> list[str]:
    """Plans recipes for GPUs; returns a line about each. Ends the program if one does not fit."""
    from megatron_fp16rl.tools.plan.submission import distinct, plan_of

    lines: list[str] = []
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
    return lines


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

    --watch redraws in place; where the output is no terminal it prints a table after each change.

    Examples:

        fp16rl status

        fp16rl status tiny-dense-grpo-fp16 --watch

        fp16rl status 4711 --json
    """
    folder = root if what is None else statuses.find(what, root)
    runs, one = statuses.all_runs(folder), statuses.is_run(folder)
    if not runs:
        say(f"there is no run in {folder}")
    if not watch:
        seen = statuses.read(runs)
    elif as_json:
        *_, seen = statuses.follow(runs, _EVERY_S)
    else:
        seen = _watch(statuses.follow(runs, _EVERY_S), one)
    if as_json:
        values = [asdict(status) for status in seen]
        print(json.dumps(values[0] if one else {"runs": values}))
    elif not watch:
        console.print(status_table.of(seen, one))
    if watch and any(status.state != outcome.DONE for status in seen):
        raise typer.Exit(FAILED)


def _watch(following: Iterator[list[Status]], one: bool) -> list[Status]:
    """Shows each state of runs: in place on a terminal, else a table after each change. Returns the last."""
    seen: list[Status] = []
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for seen in following:
                live.update(status_table.of(seen, one), refresh=True)
        return seen
    before: list[Status] | None = None
    for seen in following:
        if seen != before:
            console.print(status_table.of(seen, one))
            sys.stdout.flush()
        before = seen
    return seen


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
    done = statuses.cancel(statuses.find(what, root), save)
    for line in done:
        console.print(line)
    if not done:
        fail(f"nothing works on {what}; see fp16rl status {what}", FAILED)
