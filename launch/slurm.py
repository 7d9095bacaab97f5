"""Slurm: a recipe becomes a batch script; a script becomes a job."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from launch.container import completed
from launch.paths import absolute
from launch.rank import RECIPE_FILE
from megatron_fp16rl.files import write_text
from megatron_fp16rl.recipe import Recipe, RecipeError, Slurm

PROJECT = Path(__file__).parent.parent
SCRIPT, JOBS = "job.sbatch", "jobs"
DRAFT = (
    "draft.sbatch"  # of a job that is to go on with a run, until Slurm has said that it takes it
)
NO_SECTION = (
    "there is no slurm: section; add one, e.g. "
    "slurm: {account: ..., partition: ..., learner_nodes: 1, gpus_per_node: 8}"
)
_TIMEOUT_S = 60
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_ALIVE = (*_WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING")


class SlurmError(RuntimeError):
    """Slurm refused, or is not here. The message holds its reason."""


@dataclass(frozen=True)
class Job:
    """A job in Slurm's words. reason: why it waits or ended; left: of its time."""

    state: str
    reason: str = ""
    nodes: str = ""
    left: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it has no nodes yet."""
        return self.state in _WAITING

    @property
    def is_alive(self) -> bool:
        """Whether it waits, runs or is on its way in or out."""
        return self.state in _ALIVE


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


def write_job(recipe: Recipe, folder: Path, chain: bool = False) -> Path:
    """Writes the resolved recipe and the batch script into a run directory; returns the script.

    chain: the job waits until no other of its name and user runs.
    """
    write_text(folder / RECIPE_FILE, absolute(recipe).to_yaml())
    (folder / "logs").mkdir(exist_ok=True)
    write_text(folder / SCRIPT, render(recipe, folder, chain))
    (folder / DRAFT).unlink(missing_ok=True)
    return folder / SCRIPT


def write_draft(recipe: Recipe, folder: Path, chain: bool = False) -> Path:
    """The script alone, beside the run's own: a run is not changed by a job that Slurm refuses."""
    write_text(folder / DRAFT, render(recipe, folder, chain))
    return folder / DRAFT


def render(
    recipe: Recipe,
    folder: Path,
    chain: bool = False,
    template: str = "train.sbatch.j2",
    **values: object,
) -> str:
    """The batch script of a recipe that runs in `folder`. Raises RecipeError without `slurm:`.

    values: for the template; they win over what a recipe gives it.
    """
    slurm = completed(recipe)
    if slurm is None:
        raise RecipeError(NO_SECTION)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROJECT / "slurm"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["quote"] = _quoted
    learner, rollout = _steps(recipe)
    given = {
        "recipe": recipe,
        "slurm": slurm,
        "folder": folder,
        "project": PROJECT,
        "where": Path.cwd(),
        "components": _components(recipe, folder, chain),
        "learner": learner,
        "rollout": rollout,
        "preflight": _preflight(slurm),
        "step_options": _pyxis(slurm, folder),
        "program": _program(slurm, folder),
        "here": _program(slurm, folder) if slurm.container is None else "python3",
    }
    return templates.get_template(template).render({**given, **values})


def check(script: Path) -> str:
    """What Slurm would do with a script (`sbatch --test-only`). Raises SlurmError if it refuses."""
    return _slurm("sbatch", "--test-only", str(script))


def submit(script: Path) -> str:
    """Puts a script into the queue; returns the job's number, and keeps it. Raises SlurmError."""
    job = _slurm("sbatch", "--parsable", str(script)).split(";")[0].strip()
    record(script.parent, job)
    return job


def record(folder: Path, job: str) -> None:
    """Keeps the number of a job of a run, for when Slurm has forgotten it."""
    write_text(folder / JOBS, "".join(f"{known}\n" for known in [*jobs(folder), job]))


def jobs(folder: Path) -> list[str]:
    """Numbers of all jobs that a run was ever submitted as."""
    file = folder / JOBS
    return file.read_text().split() if file.exists() else []


def cancel(job: str) -> None:
    """Ends a job. Raises SlurmError."""
    _slurm("scancel", job)


def ask_to_save(job: str) -> None:
    """Tells a running job's batch script that it is to save and end. Raises SlurmError."""
    _slurm("scancel", "--batch", "--signal=USR1", job)


def queue(wanted: Sequence[str]) -> dict[str, Job]:
    """What Slurm knows of jobs, by number; those that it has forgotten are not there.

    Raises SlurmError.
    """
    if not wanted:
        return {}
    found = {}
    fields = "%i|%T|%r|%N|%L"
    for line in _asked("squeue", "-h", "-r", "-t", "all", "-j", ",".join(wanted), "-o", fields):
        number, *rest = line.split("|")
        found.setdefault(number.partition("+")[0], Job(*rest))  # 12+0: of a heterogeneous job
    lost = [job for job in wanted if job not in found]
    if lost and shutil.which("sacct"):
        for line in _asked("sacct", "-n", "-X", "-P", "-j", ",".join(lost), "-o", "JobID,State"):
            number, state = line.split("|")
            found.setdefault(number.partition("+")[0], Job(state.split()[0]))
    return found


def details(job: str) -> dict[str, str]:
    """What `scontrol show job` says; nothing if Slurm has forgotten it. Raises SlurmError."""
    words = " ".join(_asked("scontrol", "-o", "show", "job", job)[:1]).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _asked(*command: str) -> list[str]:
    """The lines of an answer; none if Slurm knows no such job, or keeps no accounts."""
    try:
        return _slurm(*command).splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error) or "accounting storage is disabled" in str(error):
            return []
        raise


def available() -> bool:
    """Whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None


def _slurm(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on this machine: submit from a cluster's login node")
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise SlurmError(f"{shlex.join(command)}: {(done.stderr or done.stdout).strip()}")
    return (done.stdout + done.stderr).strip()  # --test-only answers on stderr


def _steps(recipe: Recipe) -> tuple[Step, Step]:
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


def _preflight(slurm: Slurm) -> Step | None:
    """A task on each node; none without MPI, nor with one node, nor in a heterogeneous job."""
    nodes = slurm.learner_nodes + slurm.rollout_nodes
    if slurm.mpi == "none" or nodes == 1 or slurm.rollout_partition is not None:
        return None
    return Step(nodes, nodes, None)


def _components(recipe: Recipe, folder: Path, chain: bool) -> list[list[str]]:
    """#SBATCH options of the job, or of both components of a heterogeneous one."""
    slurm = recipe.slurm
    common = {
        "job-name": recipe.name,
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
        "output": folder / "logs" / "slurm.out",
        "open-mode": "append",
        "requeue": True,
        "exclusive": True if slurm.gpus_per_node else None,
        "signal": f"B:USR1@{slurm.warn_s}",
        "dependency": "singleton" if chain else None,
        **slurm.options,
    }
    several = slurm.rollout_partition is not None
    first = slurm.learner_nodes + (0 if several else slurm.rollout_nodes)
    share = _share(recipe)
    components = [_options({**share[0], **common, "nodes": first, **_devices(slurm)})]
    if several:
        second = {"partition": slurm.rollout_partition, "nodes": slurm.rollout_nodes}
        components.append(_options({**share[1], **second, **_devices(slurm)}))
    return components


def _share(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """What a job that does not take whole nodes asks of each, for learners and for servers: a CPU a task."""
    if recipe.slurm.gpus_per_node:
        return {}, {}
    learner, rollout = (-(-step.tasks // max(1, step.nodes)) for step in _steps(recipe))
    if recipe.slurm.rollout_partition is None:
        separate = recipe.slurm.rollout_nodes
        learner = max(learner, rollout) if separate else learner + rollout
    return {"ntasks-per-node": learner}, {"ntasks-per-node": rollout}


def _devices(slurm: Slurm) -> dict[str, object]:
    if slurm.gres is not None:
        return {"gres": slurm.gres}
    return {"gpus-per-node": slurm.gpus_per_node or None}


def _options(values: dict[str, object]) -> list[str]:
    lines = []
    for name, value in values.items():
        if value is True:
            lines.append(f"--{name}")
        elif value is not None and value is not False:
            lines.append(f"--{name}={shlex.quote(str(value))}")
    return lines


def _quoted(value: object) -> str:
    """One word of bash. shlex leaves commas bare, which in an array look like a mistake."""
    word = shlex.quote(str(value))
    return f"'{word}'" if "," in word and word == str(value) else word


def _mounts(slurm: Slurm, folder: Path) -> str:
    return ",".join([f"{folder}:{folder}", f"{PROJECT}:{PROJECT}", *slurm.container.mounts])


def _pyxis(slurm: Slurm, folder: Path) -> list[str]:
    """srun's options for a container that Pyxis starts."""
    if slurm.container is None or slurm.container.runtime != "pyxis":
        return []
    return [
        f"--container-image={slurm.container.image}",
        f"--container-mounts={_mounts(slurm, folder)}",
        f"--container-workdir={PROJECT}",
    ]


def _program(slurm: Slurm, folder: Path) -> str:
    """Python, in the container if there is one."""
    if slurm.container is None:
        return shlex.quote(sys.executable)
    if slurm.container.runtime == "pyxis":
        return "python3"
    bound = shlex.quote(_mounts(slurm, folder))
    return f"apptainer exec --nv --bind {bound} --pwd {shlex.quote(str(PROJECT))} " + (
        f"{shlex.quote(slurm.container.image)} python3"
    )
