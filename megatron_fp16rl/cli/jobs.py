"""fp16rl submit: runs that are jobs of a cluster."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Overrides,
    console,
    fail,
    load_recipe,
)

app = typer.Typer()


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a slurm: section")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the script, check it, submit nothing.")
    ] = False,
    chain: Annotated[
        int, typer.Option(min=1, help="Jobs one after the other, each going on where one ended.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Put a recipe into Slurm's queue. The run directory holds the script, job.sbatch.

    Examples:

        fp16rl submit recipes/mine.yaml --dry-run

        fp16rl submit recipes/mine.yaml --set slurm.time=12:00:00 --chain 3
    """
    from launch import local, slurm

    resolved = load_recipe(recipe, [*(overrides or []), *([f"name={name}"] if name else [])])
    if resolved.slurm is None:
        fail(f"{recipe}: {slurm.NO_SECTION}", BAD_RECIPE)
    folder = local.new_run_folder(Path(resolved.trainer.run_root), resolved.name).resolve()
    result = {"script": str(slurm.write_job(resolved, folder, chain > 1)), "jobs": []}
    try:
        if slurm.available():
            result["check"] = slurm.check(Path(result["script"]))
        if not dry_run:
            result["jobs"] = [slurm.submit(Path(result["script"])) for _ in range(chain)]
    except slurm.SlurmError as error:
        fail(f"{error}\nthe script is {result['script']}", FAILED)
    if as_json:
        print(json.dumps(result))
        return
    console.print(f"script: {result['script']}")
    console.print(f"Slurm says: {result.get('check', 'nothing, sbatch is not here')}")
    for job in result["jobs"]:
        console.print(f"job {job}; its output: {folder / 'logs' / 'slurm.out'}")
