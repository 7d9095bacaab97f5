"""fp16rl submit, status, cancel: runs as jobs of a cluster, and how runs fare."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
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
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.terminal import Console, printable

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
    from launch import batch_script, run_folder
    from launch import sweep as sweeps

    settings = [*(overrides or []), *([setting("name", name)] if name else [])]
    # All recipes are checked, and planned, before the first directory is made.
    base = load_recipe(recipe, settings) if recipe is not None else _resumed(resume, settings)
    if base.slurm is None:
        fail(f"{recipe or resume}: {batch_script.NO_SECTION}", BAD_RECIPE)
    recipes = {base.name: base}
    if sweep and recipe is not None:
        points = sweeps.points(sweep)
        names = {label: setting("name", f"{base.name}.{label}") for label in points}
        recipes = {
            label: load_recipe(recipe, [*settings, *values, names[label]])
            for label, values in points.items()
        }
    result: dict[str, Any] = {"script": "", "jobs": [], "runs": [], "plan": []}
    if not force:
        _plan(recipes.values(), result["plan"])
    root = Path(base.trainer.run_root)
    if sweep:
        root = sweeps.new_folder(root, base.name, sweep)
    for label, each in recipes.items():
        folder = (resume or run_folder.new_run_folder(root, label)).resolve()
        _queue(result, each, folder, resume is not None, chain, dry_run)
    if as_json:
        print(json.dumps(result))
        return
    for line in result["plan"]:
        console.print(line)
    console.print(f"script: {result['script']}" + (f", for {len(recipes)} runs" if sweep else ""))
    console.print(f"Slurm says: {result.get('check', 'nothing, sbatch is not here')}")
    for job in result["jobs"]:
        console.print(f"job {job}; what becomes of it: fp16rl status {root if sweep else folder}")


def _queue(
    result: dict[str, Any], recipe: Recipe, folder: Path, resumes: bool, chain: int, dry_run: bool
) -> None:
    """Writes a run's script, has Slurm check it, then puts it into the queue.

    result: gets the script, Slurm's answer and the jobs. resumes: the run's own recipe and script are
    replaced only when Slurm takes the new ones.
    """
    from launch import batch_script, run_folder, slurm

    script = folder / (batch_script.DRAFT if resumes else batch_script.SCRIPT)
    result["runs"].append(str(folder))
    result["script"] = str(script)
    try:
        with run_folder.writable(folder):
            text = batch_script.render(recipe, folder, chain > 1)
            if resumes:
                write_text(script, text)
            else:
                batch_script.write(recipe, folder, chain > 1)
            if slurm.available() or not dry_run:
                result["check"] = slurm.check(text)
            if dry_run:
                return
            if resumes:
                script.unlink()
                script = batch_script.write(recipe, folder, chain > 1)
                result["script"] = str(script)
            for _ in range(chain):
                result["jobs"].append(slurm.submit(script))
    except slurm.SlurmError as error:
        queued = [f"\njob {job} is in the queue" for job in result["jobs"]]
        fail(f"{error}{''.join(queued)}\nthe script is {script}", FAILED)


def _resumed(run: Path | None, settings: list[str]) -> Recipe:
    """The recipe of a run that a job can go on with."""
    from launch import status as statuses

    assert run is not None
    if not statuses.is_run(run):
        fail(f"{run} is no run's directory: it has no {statuses.RECIPE_FILE}", BAD_RECIPE)
    recipe = load_recipe(run.resolve() / statuses.RECIPE_FILE, settings)
    (seen,) = statuses.read([run.resolve()])
    if seen.slurm_error and not seen.is_over:
        fail(f"whether a job has {run} already is not known: {seen.slurm_error}", FAILED)
    statuses.check_free(seen)
    resumable(run.resolve())
    return recipe


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
    printed: dict[str, str] = {}
    for seen in statuses.follow(runs, _EVERY_S) if watch else [statuses.read(runs)]:
        for status in seen if watch and not as_json else []:
            if printed.get(status.run) != (line := status_table.line(status)):
                printed[status.run] = line
                print(printable(line), flush=True)
    if as_json:
        values = [asdict(status) for status in seen]
        print(json.dumps(values[0] if one else {"runs": values}))
    elif not watch:
        console.print(status_table.of_one(seen[0]) if one else status_table.of_all(seen))
    if watch and any(status.state != outcome.DONE for status in seen):
        raise typer.Exit(FAILED)


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
