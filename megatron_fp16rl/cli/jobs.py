"""fp16rl submit, status, cancel: runs that are jobs of a cluster, and what became of all runs."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

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
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.utils.terminal import Console, printable

if TYPE_CHECKING:
    from launch.status import Status

app = typer.Typer()
Root = Annotated[Path, typer.Option(help="Where runs are looked for by name.")]
_EVERY_S = 2.0
_COLUMNS = ("state", "step", "reward", "held out", "scale", "skipped", "tokens/s", "left", "")


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

        fp16rl submit --resume runs/mine --set slurm.exclude=node7
    """
    if (recipe is None) == (resume is None):
        fail("give either a recipe or --resume RUN_DIRECTORY", BAD_RECIPE)
    from launch import sweep as sweeps

    if sweep and (chain > 1 or resume is not None):
        fail(f"{'--chain' if chain > 1 else '--resume'} does not go with --sweep", BAD_RECIPE)
    if max_running and not sweep:
        fail("--max-running goes with --sweep", BAD_RECIPE)
    settings = [*(overrides or []), *([setting("name", name)] if name else [])]
    plans: list[str] = []
    asked = None if force else plans
    again = None
    if resume is not None:
        folder, again = _resumed(resume, settings, asked)
    else:
        folder = _write(recipe, settings, sweep or [], max_running, chain > 1, asked)
    runs = sweeps.runs(folder)
    result = {"script": "", "jobs": [], "runs": [str(r) for r in runs or [folder]], "plan": plans}
    _queue(result, folder, again, chain, dry_run)
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
    running: int | None,
    chain: bool,
    plans: list[str] | None,
) -> Path:
    """Makes the directory of a run or a sweep, with its script; ends the program if it cannot.

    plans: gets a line about each plan; None to make none.
    """
    from launch import local, slurm, sweep

    recipe = load_recipe(path, settings)
    root = Path(recipe.trainer.run_root)
    if recipe.slurm is None:
        fail(f"{path}: {slurm.NO_SECTION}", BAD_RECIPE)
    try:
        if axes:
            # Everything is resolved and checked before anything is written.
            points = sweep.points([sweep.Axis.parse(text) for text in axes])
            recipes = {
                label: load_recipe(
                    path, [*settings, *values, setting("name", f"{recipe.name}.{label}")]
                )
                for label, values in points
            }
            _plan(recipes.values(), plans)
            return sweep.write(recipes, root, recipe.name, running)
        _plan([recipe], plans)
        folder = local.new_run_folder(root, recipe.name).resolve()
        slurm.write_job(recipe, folder, chain)
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    except local.Unwritable as error:
        fail(str(error), FAILED)
    return folder


def _queue(result: dict, folder: Path, again: Recipe | None, chain: int, dry_run: bool) -> None:
    """Has Slurm check a script, and puts it into the queue; ends the program if Slurm refuses.

    result: gets the script, what Slurm says and the jobs. again: the recipe of a run that goes on.
    """
    from launch import local, slurm, sweep

    script = folder / slurm.SCRIPT
    try:
        with local.writable(folder):
            if again is not None:
                script = slurm.write_draft(again, folder, chain > 1)
            if slurm.available() or not dry_run:
                result["check"] = slurm.check(script)
            if not dry_run:
                if again is not None:
                    script = slurm.write_job(again, folder, chain > 1)
                swept = sweep.runs(folder)
                for _ in range(chain):
                    result["jobs"].append(sweep.submit(folder) if swept else slurm.submit(script))
    except slurm.SlurmError as error:
        queued = [f"\njob {job} is in the queue" for job in result["jobs"]]
        fail(f"{error}{''.join(queued)}\nthe script is {script}", FAILED)
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    except local.Unwritable as error:
        fail(str(error), FAILED)
    result["script"] = str(script)


def _resumed(resume: Path, settings: list[str], plans: list[str] | None) -> tuple[Path, Recipe]:
    """The directory and the recipe of a run that a job can go on with; ends the program if none can.

    plans: as for `_plan`.
    """
    from launch import slurm
    from launch import status as statuses

    if not statuses.is_run(resume):
        fail(f"{resume} is no run's directory: it has no {statuses.RECIPE_FILE}", BAD_RECIPE)
    folder = resume.resolve()
    recipe = load_recipe(folder / statuses.RECIPE_FILE, settings)
    if recipe.slurm is None:
        fail(f"{folder / statuses.RECIPE_FILE}: {slurm.NO_SECTION}", BAD_RECIPE)
    with _errors():
        (found,) = statuses.read([folder])
    if found.slurm_error and not found.is_over:
        fail(f"whether a job has {folder} already is not known: {found.slurm_error}", FAILED)
    statuses.check_free(found)
    resumable(folder)
    try:
        _plan([recipe], plans)
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    return folder, recipe


def _plan(recipes: Iterable[Recipe], lines: list[str] | None) -> None:
    """Plans recipes for GPUs; ends the program if one does not fit. Raises RecipeError."""
    if lines is None:
        return
    from megatron_fp16rl.tools.plan.ask import distinct, plan_of

    for recipe in distinct(recipes):
        if not recipe.slurm.gpus_per_node:
            continue  # nothing is known of the nodes' memory
        with Console(stderr=True).status(Text(f"planning {recipe.name}"), spinner="dots"):
            found = plan_of(recipe)
        if found is None:
            lines.append(
                f"{recipe.name} was not planned: its model is not here, and it has no shape"
            )
            continue
        for warning in found["warnings"]:
            lines.append(f"{recipe.name}: {warning}")
        if not found["fits"]:
            said = [f"{recipe.name} does not fit: {'; '.join(found['reasons'])}"]
            for change in found["suggestions"]:
                keys = " ".join(f"--set {key}={value}" for key, value in change["changes"].items())
                said.append(f"it would with: {keys}")
            fail("\n".join([*said, "to submit it all the same: --force"]), FAILED)
        lines.append(
            f"{recipe.name} fits: {found['peak_gib']:.1f} GiB of {found['usable_gib']:.1f} at the most; a "
            f"step may take {found['step_s']:.0f} s"
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

    with _errors():
        folder = root if what is None else statuses.find(what, root)
        runs = statuses.all_runs(folder)
        one = statuses.is_run(folder)
        show: Callable[[list[Status]], RenderableType] = _one if one else _table
        if not watch:
            found = statuses.read(runs)
            if not as_json:
                console.print(show(found))
        elif as_json:
            *_, found = statuses.follow(runs, _EVERY_S)
        else:
            found = _watch(statuses.follow(runs, _EVERY_S), show)
    if as_json:
        values = [asdict(status) for status in found]
        print(json.dumps(values[0] if one else {"runs": values}))
    if watch and any(status.state != outcome.DONE for status in found):
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

    with _errors():
        told = statuses.cancel(statuses.find(what, root), save)
    for line in told:
        console.print(line)
    if not told:
        fail(f"nothing works on {what}; see fp16rl status {what}", FAILED)


@contextmanager
def _errors() -> Iterator[None]:
    """Errors that a message explains end the program with it."""
    from launch.slurm import SlurmError
    from launch.status import Elsewhere, NoSuchRun

    try:
        yield
    except NoSuchRun as error:
        fail(str(error), BAD_RECIPE)
    except (SlurmError, Elsewhere) as error:
        fail(str(error), FAILED)


def _watch(
    found: Iterable[list["Status"]], show: Callable[[list["Status"]], RenderableType]
) -> list["Status"]:
    """Shows each state in the place of the one before; without a terminal, a line for each change."""
    said: dict[str, str] = {}
    live = Live(console=console, auto_refresh=False) if sys.stdout.isatty() else nullcontext()
    with live:
        for statuses in found:
            if sys.stdout.isatty():
                live.update(show(statuses), refresh=True)
                continue
            for status in statuses:
                if said.get(status.run) != (line := _line(status)):
                    said[status.run] = line
                    print(printable(line), flush=True)
    return statuses


def _line(status: "Status") -> str:
    cells = zip(_COLUMNS, _cells(status), strict=True)
    return " | ".join([status.run, *(f"{name} {cell}" for name, cell in cells if cell)])


def _cells(status: "Status") -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    scale = "" if not status.loss_scale else f"2^{math.log2(status.loss_scale):g}"
    return [
        status.state,
        f"{status.steps_done}/{status.steps}",
        shown(status.reward, ".3f"),
        shown(status.accuracy, ".3f"),
        scale,
        shown(status.skipped, "d"),
        shown(status.tokens_per_s, ",.0f"),
        "" if status.left_s is None else f"{status.left_s / 60:.1f} min",
        _note(status),
    ]


def _note(status: "Status") -> str:
    """What else is worth a glance, in a line."""
    jobs = [
        f"job {number} {job.state}" + (f" ({job.reason})" if job.reason not in ("", "None") else "")
        for number, job in status.jobs.items()
    ]
    restarts = [f"{len(status.causes)} restart(s)"] if status.causes else []
    ended = [] if status.jobs or status.launcher else [status.reason or status.last_error or ""]
    silent = [f"Slurm is silent: {status.slurm_error}"] if status.slurm_error else []
    said = (*status.faults, *jobs, *silent, *restarts, *ended)
    return "; ".join(text.splitlines()[0] for text in said if text)


def _table(found: list["Status"]) -> Table:
    table = Table("run", *_COLUMNS)
    for status in found:
        table.add_row(status.run, *_cells(status))
    return table


def _one(found: list["Status"]) -> Table:
    """Rows of a name and a value."""
    (status,) = found
    rows = [("run", status.folder), *zip(_COLUMNS[:-1], _cells(status), strict=False)]
    rows += [("why", status.reason), ("launcher", status.launcher)]
    for number, job in status.jobs.items():
        where = f"on {job.nodes}, {job.left} left" if job.nodes else job.reason
        rows.append(("job", f"{number} {job.state} {where}"))
    rows.append(("Slurm", status.slurm_error))
    rows += [("damaged", fault) for fault in status.faults]
    rows += [("attempts", str(status.attempts)), *(("cause", cause) for cause in status.causes)]
    rows.append(("last error", status.last_error))
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value:
            table.add_row(name, value)
    return table
