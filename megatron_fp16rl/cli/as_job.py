"""Commands that run here, or as a Slurm job: fp16rl bench, fp16rl selftest."""

import json
from typing import Annotated, Any

import typer

from megatron_fp16rl.cli.common import console
from megatron_fp16rl.tools.bench.common import Result

Nodes = Annotated[int | None, typer.Option(min=1, help="Run as a Slurm job on so many nodes.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="With --nodes: write and check the script only.")
]


def show_job(submitted: Result, as_json: bool) -> None:
    """Prints what job.submit returns."""
    if as_json:
        print(json.dumps(submitted))
        return
    for key, value in submitted.items():
        console.print(f"{key}: {cell(value)}")
    if submitted["jobs"]:
        console.print(f"fp16rl status {submitted['run']} --watch")


def in_job(words: list[str], settings: list[str]) -> list[str]:
    """This command line as a job runs it: without --nodes and --dry-run, and with settings."""
    own = {"--dry-run", "--json", "--nodes"}
    before = ["", *words]
    kept = [
        word
        for word, previous in zip(words, before, strict=False)
        if word not in own and previous != "--nodes" and not word.startswith("--nodes=")
    ]
    return [*kept, *(f"--set={setting}" for setting in settings), "--json"]


def cell(value: Any) -> str:
    if value is None or value == []:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
