"""fp16rl selftest: whether FP16 RL computes here what it should."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from megatron_fp16rl.cli.as_job import DryRun, Nodes, in_job, show_job
from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Overrides,
    console,
    fail,
    names,
    say,
)
from megatron_fp16rl.tools.bench import job
from megatron_fp16rl.tools.bench.common import load_recipe
from megatron_fp16rl.tools.bench.ranks import JOB_FOLDER
from megatron_fp16rl.utils.files import write_text

if TYPE_CHECKING:  # importing it imports torch
    from megatron_fp16rl.tools.selftest.result import Report, RowResult

app = typer.Typer()
_STYLES = {"pass": "green", "fail": "red", "not here": "dim"}


@app.command()
def selftest(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer models, smaller sizes, no servers: a minute on CPUs."),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="Use so many of the GPUs; 0: the CPU. Default: all."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Rows, e.g. parity,scaling. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the JSON here.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page of it here.")
    ] = None,
    nodes: Nodes = None,
    recipe: Annotated[
        Path | None, typer.Option(help="With --nodes: whose slurm: section the job has.")
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Check that FP16 RL computes here what it should: a row a question, each in a process of its own.

    Rows: environment, collectives, parity, layouts, scaling, logprobs, products, kernels, waits, shapes, speed, memory,
    sync, mismatch. Each says what was measured, the bound and where that comes from; a row that cannot run says why.
    Exit code 1: a row failed. With --nodes every node runs all rows, and collectives are over all of them.

    Examples:

        fp16rl selftest --quick

        srun --gpus=1 fp16rl selftest --out selftest.json --html selftest.html

        fp16rl selftest --only parity,scaling --gpus 0

        fp16rl selftest --nodes 2 --recipe recipes/mine.yaml
    """
    is_job = JOB_FOLDER in os.environ
    if nodes is not None and not is_job:
        _submit(nodes, recipe, overrides or [], dry_run, as_json)
        return
    if (recipe or overrides or dry_run) and not is_job:
        fail("--recipe, --set and --dry-run are for a job: say --nodes, too", BAD_RECIPE)
    _choose_gpus(gpus)
    report = _run(quick, only)
    if report is not None:
        _show(report, out, html, as_json)
        raise typer.Exit(0 if report.passed else FAILED)


def _run(quick: bool, only: list[str] | None) -> "Report | None":
    """The report of this machine, or of all of a job's; None on the others of these."""
    from megatron_fp16rl.tools.selftest import ranks
    from megatron_fp16rl.tools.selftest.rows import ROWS
    from megatron_fp16rl.tools.selftest.run import run

    usual = [name for name, row in ROWS.items() if row.in_quick or not quick]
    chosen = names(ROWS, ",".join(only or usual), "--only")
    if JOB_FOLDER not in os.environ:
        return run(chosen, quick, say)
    folder = Path(os.environ[JOB_FOLDER])
    is_first = ranks.join(folder)
    return ranks.merge(folder, run(chosen, quick, say if is_first else lambda _: None))


def _show(report: "Report", out: Path | None, html: Path | None, as_json: bool) -> None:
    values = report.model_dump(mode="json")
    if out is not None:
        write_text(out, json.dumps(values, indent=1) + "\n")
    if html is not None:
        from megatron_fp16rl.tools.report.page import render

        write_text(html, render("selftest.html.j2", report=report))
    if as_json:
        print(json.dumps(values))
    else:
        _print(report)


def _submit(
    nodes: int, recipe: Path | None, overrides: list[str], dry_run: bool, as_json: bool
) -> None:
    """Submits this command line, to run on each of the nodes."""
    settings = [*overrides, *job.settings(load_recipe(recipe, overrides), nodes, False)]
    command = in_job(sys.argv[1:], [])
    of_job = load_recipe(recipe, settings)
    show_job(job.submit(of_job, "selftest", nodes, command, dry_run), as_json)


def _choose_gpus(count: int | None) -> None:
    """Leaves the first `count` visible to this process and the rows'."""
    if count is None:
        return
    import torch

    visible = torch.cuda.device_count()
    if count > visible:
        fail(f"--gpus {count}: {visible} are visible here", BAD_RECIPE)
    listed = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(visible)))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(listed.split(",")[:count])


def _print(report: "Report") -> None:
    table = Table("row", "", "measured", "", "bound", "s")
    several = len(report.machine["hosts"]) > 1
    for row in report.shown:
        name = f"{row.name} on {row.host}" if several else row.name
        table.add_row(name, row.status, row.what, "", "", f"{row.seconds:.0f}", style="bold")
        for line in _lines(row):
            failed = line[0] in row.failed or (row.status == "fail" and not row.measured)
            table.add_row("", "", *line, "", style=_STYLES["fail"] if failed else None)
        table.add_row("", "", f"bound: {row.source}", "", "", "", style="dim", end_section=True)
    console.print(table)
    console.print(str(report.machine["platform"]), style="dim")
    for row in report.shown:
        if row.log:
            console.print(f"{row.name} ended so:\n{row.log}", style="dim")
    console.print(report.summary)


def _lines(row: "RowResult") -> list[tuple[str, str, str]]:
    """What was measured, its value, its bound; or the reason why nothing was."""
    if row.reason is not None:
        return [(row.reason, "", "")]
    return [
        (name, value if isinstance(value, str) else f"{value:.3g}", row.bound[name])
        for name, value in row.measured.items()
    ]
