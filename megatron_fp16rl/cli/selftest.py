"""fp16rl selftest: whether FP16 RL computes here what it should."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, AsJson, console, fail, names, say
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
    as_json: AsJson = False,
) -> None:
    """Check that FP16 RL computes here what it should: a row a question, each in a process of its own.

    Rows: environment, parity, scaling, logprobs, products, waits, memory, sync, mismatch. Each says what was measured, the
    bound and where that comes from; a row that cannot run says why. Exit code 1: a row failed.

    Examples:

        fp16rl selftest --quick

        srun --gpus=1 fp16rl selftest --out selftest.json --html selftest.html

        fp16rl selftest --only parity,scaling --gpus 0
    """
    _choose_gpus(gpus)
    from megatron_fp16rl.tools.selftest.rows import ROWS
    from megatron_fp16rl.tools.selftest.run import run

    usual = [name for name, row in ROWS.items() if not (quick and row.starts_servers)]
    report = run(names(ROWS, ",".join(only or usual), "--only"), quick, say)
    result = report.model_dump(mode="json")
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    if html is not None:
        from megatron_fp16rl.tools.report.page import render

        write_text(html, render("selftest.html.j2", report=report))
    if as_json:
        print(json.dumps(result))
    else:
        _print(report)
    raise typer.Exit(0 if report.passed else FAILED)


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
    for row in report.rows:
        table.add_row(row.name, row.status, row.what, "", "", f"{row.seconds:.0f}", style="bold")
        for line in _lines(row):
            failed = line[0] in row.failed or (row.status == "fail" and not row.measured)
            table.add_row("", "", *line, "", style=_STYLES["fail"] if failed else None)
        table.add_row("", "", f"bound: {row.source}", "", "", "", style="dim", end_section=True)
    console.print(table)
    console.print(str(report.machine["platform"]), style="dim")
    for row in report.rows:
        if row.log:
            console.print(f"{row.name} ended so:\n{row.log}", style="dim")
    count = {
        status: sum(row.status == status for row in report.rows)
        for status in ("pass", "fail", "not here")
    }
    console.print(", ".join(f"{number} {status}" for status, number in count.items() if number))


def _lines(row: "RowResult") -> list[tuple[str, str, str]]:
    """What was measured, its value, its bound; or the reason why nothing was."""
    if row.reason is not None:
        return [(row.reason, "", "")]
    return [
        (name, value if isinstance(value, str) else f"{value:.3g}", row.bound[name])
        for name, value in row.measured.items()
    ]
