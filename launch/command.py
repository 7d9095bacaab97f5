"""A command of ours as a Slurm job: the same command line, run inside the job."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from launch import slurm
from launch.local import new_run_folder
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
    again: bool = False  # goes back into the queue when it is preempted or out of time


def folder() -> Path | None:
    """The folder of the job that this process runs in; None if it is in no such job."""
    return Path(os.environ[_FOLDER]) if _FOLDER in os.environ else None


def submit(job: Job, recipe: Recipe, dry_run: bool) -> dict[str, object]:
    """Writes the script that runs this command line, checks it, and puts it into the queue.

    recipe: for its slurm: section. Raises SlurmError.
    """
    wanted = _for_job(recipe, job)
    where = new_run_folder(Path(recipe.trainer.run_root), job.name).resolve()
    (where / "logs").mkdir()
    script = where / slurm.SCRIPT
    text = slurm.render(
        wanted,
        where,
        template=job.template,
        own={} if job.again else {"requeue": False, "signal": False},
        tasks=slurm.Step(job.nodes, job.tasks, None),
        command=sys.argv[1:],
    )
    write_text(script, text)
    output = where / "logs" / "slurm.out"  # as slurm.render has it
    answer: dict[str, object] = {"script": str(script), "output": str(output), "jobs": []}
    if slurm.available():
        answer["check"] = slurm.check(script)
    if not dry_run:  # without Slurm this says so
        answer["jobs"] = [slurm.submit(script)]
    return answer


def _for_job(recipe: Recipe, job: Job) -> Recipe:
    """The recipe, asking Slurm for what this job needs."""
    asked = recipe.slurm or Slurm()
    changes = {
        "learner_nodes": job.nodes,
        "rollout_nodes": 0,
        "rollout_partition": None,
    }
    return recipe.model_copy(update={"name": job.name, "slurm": asked.model_copy(update=changes)})
