"""The head of a batch script: what a job asks Slurm for, and what a shell may add."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.recipe import Recipe, RecipeError, Slurm
from megatron_fp16rl.recipe.slurm import reserved

_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
# Variables of sbatch that are not called after their options.
_OTHER_NAMES = {"timelimit": "time", "array-inx": "array", "req-switch": "switches"}
# What a shell's profile may say where the recipe does not.
_WHO_AND_WHERE = ("account", "partition", "qos", "reservation", "constraint")
_CONFIGURATION = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class Step:
    """One srun of the job."""

    nodes: int
    tasks: int
    group: int | None  # of a heterogeneous job

    @property
    def options(self) -> str:
        """For srun. Each node gets its share of the tasks."""
        found = [
            f"--nodes={self.nodes}",
            f"--ntasks={self.tasks}",
            f"--ntasks-per-node={-(-self.tasks // self.nodes)}",
        ]
        if self.group is not None:
            found.insert(0, f"--het-group={self.group}")
        return " ".join(found)


def steps(recipe: Recipe) -> tuple[Step, Step]:
    """Those of the learner's ranks and of the servers' keepers."""
    slurm = recipe.slurm
    several = slurm.rollout_partition is not None
    servers = 0 if recipe.rollout.replay else recipe.rollout.servers
    if slurm.gpus_per_node and recipe.rollout.tensor_parallel > slurm.gpus_per_node:
        servers *= -(-recipe.rollout.tensor_parallel // slurm.gpus_per_node)  # a task on each node
    return (
        Step(slurm.learner_nodes, recipe.learner.ranks, 0 if several else None),
        Step(
            min(slurm.rollout_nodes or slurm.learner_nodes, servers),
            servers,
            1 if several else None,
        ),
    )


Options = Mapping[str, str | int | bool | None]


def components(recipe: Recipe, folder: Path, chain: bool, own: Options) -> list[list[str]]:
    """#SBATCH options of the job, or of both components of a heterogeneous one.

    own: what this kind of job asks for besides.
    """
    slurm = recipe.slurm
    common = {
        "job-name": folder.name,  # not the recipe's: jobs of a chain wait for all of their name
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "reservation": slurm.reservation,
        "comment": slurm.comment,
        "time": slurm.time,
        "mail-user": slurm.mail_user,
        "mail-type": "FAIL,END,REQUEUE" if slurm.mail_user else None,
        "output": log_pattern(folder, "slurm.out"),
        "open-mode": "append",
        "requeue": True,
        "exclusive": True if slurm.gpus_per_node else None,
        "signal": f"B:USR1@{slurm.warn_s}",
        **own,
        **slurm.options,
    }
    if chain:
        earlier = slurm.options.get("dependency")
        common["dependency"] = f"singleton,{earlier}" if earlier else "singleton"
    several = slurm.rollout_partition is not None
    first = slurm.learner_nodes + (0 if several else slurm.rollout_nodes)
    share = _share(recipe)
    found = [_options({**share[0], **common, "nodes": first, **_devices(slurm)})]
    if several:
        second = {"partition": slurm.rollout_partition, "nodes": slurm.rollout_nodes}
        found.append(_options({**share[1], **second, **_devices(slurm)}))
    return found


def log_pattern(folder: Path, name: str) -> str:
    """A log of a run directory as --output wants it, where % begins what stands for something else.

    Raises RecipeError of a directory that cannot be written so.
    """
    if found := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]", str(folder)):
        raise RecipeError(
            f"trainer.run_root: the path of the run directory, {str(folder)!r}, holds {found[0]!r}, which "
            "Slurm cannot write to; choose another"
        )
    return f"{str(folder).replace('%', '%%')}/logs/{name}"


def shell(environment: Mapping[str, str], script: str) -> dict[str, str]:
    """What is left of a shell's environment for sbatch to look at, and for the job to inherit.

    SBATCH_* would win over what the script says; SLURM_* of an allocation in which this shell runs
    would be taken for the job's own.
    """
    said = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    kept = {}
    for name, value in environment.items():
        if name.startswith("SBATCH_"):
            option = name.removeprefix("SBATCH_").lower().replace("_", "-")
            option = _OTHER_NAMES.get(option, option)
            if option.removeprefix("no-") in said:
                continue
            if reserved(option) and option not in _WHO_AND_WHERE:
                continue
        inside = "SLURM_JOB_ID" in environment
        if inside and name.startswith("SLURM_") and name not in _CONFIGURATION:
            continue
        kept[name] = value
    return kept


def _share(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """What a job that does not take whole nodes asks of each, for learners and for servers: a CPU a task."""
    if recipe.slurm.gpus_per_node:
        return {}, {}
    learner, rollout = (-(-step.tasks // max(1, step.nodes)) for step in steps(recipe))
    if recipe.slurm.rollout_partition is None:
        separate = recipe.slurm.rollout_nodes
        learner = max(learner, rollout) if separate else learner + rollout
    return {"ntasks-per-node": learner}, {"ntasks-per-node": rollout}


def _devices(slurm: Slurm) -> dict[str, str | int | None]:
    if slurm.gres is not None:
        return {"gres": slurm.gres}
    return {"gpus-per-node": slurm.gpus_per_node or None}


def _options(values: Options) -> list[str]:
    lines = []
    for name, value in values.items():
        if value is True:
            lines.append(f"--{name}")
        elif value is not None and value is not False:
            lines.append(f"--{name}={_word(str(value))}")
    return lines


def _word(text: str) -> str:
    """As sbatch reads its lines, which is not as bash does: a backslash counts in single quotes too."""
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
