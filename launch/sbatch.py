"""What a job asks Slurm for: #SBATCH options, and the nodes and tasks of its steps."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.recipe import Recipe, RecipeError, Slurm

_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
# What a shell's profile may say where the recipe does not.
_WHO_AND_WHERE = ("account", "partition", "qos", "reservation", "constraint")
_CONFIGURATION = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class Step:
    """Nodes and tasks of one srun."""

    nodes: int
    tasks: int
    first_node: int = 0  # of the job

    @property
    def tasks_per_node(self) -> int:
        """At the most."""
        return -(-self.tasks // max(1, self.nodes))

    @property
    def options(self) -> str:
        """For srun. Each node gets its share of the tasks."""
        return (
            f"--nodes={self.nodes} --relative={self.first_node} --ntasks={self.tasks} "
            f"--ntasks-per-node={self.tasks_per_node}"
        )


def steps(recipe: Recipe, slurm: Slurm) -> tuple[Step, Step]:
    """The steps of the learner ranks and of the server supervisors."""
    tasks, tensor_parallel = recipe.servers, recipe.rollout.tensor_parallel
    if slurm.gpus_per_node and tensor_parallel > slurm.gpus_per_node:
        tasks *= -(-tensor_parallel // slurm.gpus_per_node)  # one on each node that a server spans
    nodes = min(slurm.rollout_nodes or slurm.learner_nodes, tasks)
    first_node = slurm.learner_nodes if slurm.rollout_nodes else 0
    servers = Step(nodes, tasks, first_node=first_node)
    return Step(slurm.learner_nodes, recipe.learner.ranks), servers


def options(recipe: Recipe, slurm: Slurm, folder: Path, chain: bool) -> list[str]:
    """#SBATCH options of the job."""
    learner, rollout = (step.tasks_per_node for step in steps(recipe, slurm))
    job: dict[str, str | int | bool | None] = {
        # Without GPUs a job does not take whole nodes: it asks for a CPU a task.
        "ntasks-per-node": max(learner, rollout) if slurm.rollout_nodes else learner + rollout,
        "job-name": folder.name,  # not the recipe's: jobs of a chain wait for all of their name
        "time": slurm.time,
        "output": _log(folder),
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR1@{slurm.warn_s}",
        "nodes": slurm.nodes,
    }
    if slurm.gpus_per_node:
        del job["ntasks-per-node"]
        job |= {"exclusive": True, "gpus-per-node": slurm.gpus_per_node}
    if slurm.gres is not None:
        job |= {"gpus-per-node": None, "gres": slurm.gres}
    job |= slurm.options
    if chain:
        earlier = slurm.options.get("dependency")
        job["dependency"] = f"singleton,{earlier}" if earlier else "singleton"
    lines = []
    for name, value in job.items():
        if value is True:
            lines.append(f"--{name}")
        elif value is not None and value is not False:
            lines.append(f"--{name}={_word(str(value))}")
    return lines


def shell(environment: Mapping[str, str], script: str) -> dict[str, str]:
    """The part of a shell's environment that sbatch may see and the job inherits.

    SBATCH_* would win over the script: they count where they say who submits and where, and the recipe
    does not. SLURM_* of an allocation in which this shell runs would be taken for the job's own.
    """
    written = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    usable = [f"SBATCH_{name.upper()}" for name in _WHO_AND_WHERE if name not in written]
    inside = "SLURM_JOB_ID" in environment
    return {
        name: value
        for name, value in environment.items()
        if (name in usable or not name.startswith("SBATCH_"))
        and (name in _CONFIGURATION or not (inside and name.startswith("SLURM_")))
    }


def _log(folder: Path) -> str:
    """The log of a job as --output takes it, where % begins a placeholder. Raises RecipeError."""
    if odd := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]", str(folder)):
        raise RecipeError(
            f"trainer.run_root: the path of the run directory, {str(folder)!r}, holds {odd[0]!r}, which "
            "Slurm cannot write to; choose another"
        )
    return f"{str(folder).replace('%', '%%')}/logs/slurm.out"


def _word(text: str) -> str:
    """As sbatch reads its lines, which is not as bash does: a backslash counts in single quotes too."""
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
