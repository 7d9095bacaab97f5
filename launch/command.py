"""A command of ours as a Slurm job: the same command line, run inside the job."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import batch_script, slurm
from launch.run_folder import new_run_folder
from launch.sbatch import Step
from megatron_fp16rl.recipe import Recipe, Slurm
from megatron_fp16rl.utils.files import write_text

_FOLDER = "FP16RL_JOB_FOLDER"


@dataclass(frozen=True)
class Job:
    """What runs this process's command line, and on how much."""

    template: str  # in slurm/
    name: str
    nodes: int = 1
    tasks: int = 1


def folder() -> Path | None:
    """The folder of the job that this process runs in; None if it is in no such job."""
    return Path(os.environ[_FOLDER]) if _FOLDER in os.environ else None


def submit(job: Job, recipe: Recipe, dry_run: bool) -> dict[str, Any]:
    """Writes the script that runs this command line, checks it, and puts it into the queue.

    recipe: for its slurm: section. Raises SlurmError.
    """
    nodes = {"learner_nodes": job.nodes, "rollout_nodes": 0, "rollout_partition": None}
    section = (recipe.slurm or Slurm()).model_copy(update=nodes)
    job_folder = new_run_folder(Path(recipe.trainer.run_root), job.name).resolve()
    output = job_folder / "logs" / "slurm.out"  # as sbatch.components has it
    output.parent.mkdir()
    script = job_folder / batch_script.SCRIPT
    text = batch_script.render(
        recipe.model_copy(update={"name": job.name, "slurm": section}),
        job_folder,
        template=job.template,
        options={"requeue": False, "signal": False},
        tasks=Step(job.nodes, job.tasks),
        command=sys.argv[1:],
    )
    write_text(script, text)
    answer: dict[str, Any] = {"script": str(script), "output": str(output), "jobs": []}
    if slurm.available():
        answer["check"] = slurm.check(script)
    if not dry_run:  # without Slurm this says so
        answer["jobs"] = [slurm.submit(script)]
    return answer
