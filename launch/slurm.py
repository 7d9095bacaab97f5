"""Slurm: a recipe becomes a batch script; a script becomes a job."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from launch import sbatch
from launch.container import completed
from launch.paths import absolute
from launch.rank import RECIPE_FILE
from launch.sbatch import Step
from megatron_fp16rl.recipe import Recipe, RecipeError, Slurm
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import write_text

PROJECT = Path(__file__).parent.parent
SCRIPT, JOBS = "job.sbatch", "jobs"
DRAFT = (
    "draft.sbatch"  # of a job that is to go on with a run, until Slurm has said that it takes it
)
NO_SECTION = (
    "there is no slurm: section; add one, e.g. "
    "slurm: {account: ..., partition: ..., learner_nodes: 1, gpus_per_node: 8}"
)
TIMEOUT_S = 60
_BASH = "/bin/bash"
_OF = "# of "  # whose jobs these are, in the first line
_NUMBER = re.compile(r"\d+(_\d+)?(;[\w.-]+)?")
_GONE = ("Invalid job id", "already completing or completed")
_WAITING = (
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
    "RESV_DEL_HOLD",
)
# Every other state is one of a job that may still work on its run, states of later versions too.
_OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
)


class SlurmError(ExplainedError):
    """Slurm refused, or is not here. The message holds its reason."""


class SlurmSilent(SlurmError):
    """Slurm did not answer."""


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
        return self.state not in _OVER


def write_job(recipe: Recipe, folder: Path, chain: bool = False) -> Path:
    """Writes the resolved recipe and the batch script into a run directory; returns the script.

    chain: the job waits until no other of its name and user runs.
    """
    script = render(recipe, folder, chain)
    write_text(folder / RECIPE_FILE, absolute(recipe).to_yaml())
    (folder / "logs").mkdir(exist_ok=True)
    write_text(folder / SCRIPT, script)
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
    own: sbatch.Options | None = None,
    **values: object,
) -> str:
    """The batch script of a recipe that runs in `folder`. Raises RecipeError if there can be none.

    own: options that this kind of job asks Slurm for besides. values: for the template; they win over
    what a recipe gives it.
    """
    slurm = completed(recipe)
    if slurm is None:
        raise RecipeError(NO_SECTION)
    _check_bash(slurm.setup)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROJECT / "slurm"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["quote"] = _quoted
    learner, rollout = sbatch.steps(recipe)
    given = {
        "recipe": recipe,
        "slurm": slurm,
        "folder": folder,
        "project": PROJECT,
        "where": Path.cwd(),
        "components": sbatch.components(recipe, folder, chain, own or {}),
        "learner": learner,
        "rollout": rollout,
        "preflight": _preflight(slurm),
        "step_options": _pyxis(slurm, folder),
        "program": _program(slurm, folder),
        "python": sys.executable if slurm.container is None else None,
        "here": _program(slurm, folder) if slurm.container is None else "python3",
    }
    return templates.get_template(template).render({**given, **values})


def _check_bash(setup: Sequence[str]) -> None:
    """Raises RecipeError if lines do not end what they begin: they would swallow what comes after them."""
    if not setup or not Path(_BASH).exists():
        return
    done = subprocess.run(
        [_BASH, "-n"],
        input="\n".join(setup) + "\n",
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.stderr:
        raise RecipeError(f"slurm.setup: {done.stderr.strip().replace(f'{_BASH}: ', '')}")


def check(script: Path) -> str:
    """What Slurm would do with a script (`sbatch --test-only`). Raises SlurmError if it refuses."""
    done = _sbatch("--test-only", script)
    return (done.stdout + done.stderr).strip()  # it answers on stderr


def submit(script: Path) -> str:
    """Puts a script into the queue; returns the job's number, and keeps it. Raises SlurmError.

    What a site's sbatch says besides goes to stderr.
    """
    done = _sbatch("--parsable", script)
    lines = [line.strip() for line in done.stdout.splitlines()]
    numbers = [line for line in lines if _NUMBER.fullmatch(line)]
    said = [line for line in (*lines, *done.stderr.splitlines()) if line and line not in numbers]
    if not numbers:
        raise SlurmError(
            f"sbatch named no job: {' '.join(said)!r}. It may have taken it all the same: look with "
            "squeue --me before you submit it again"
        )
    if said:
        print("\n".join(said), file=sys.stderr)
    record(script.parent, numbers[-1])
    return numbers[-1]


def record(folder: Path, job: str) -> None:
    """Keeps the number of a job of a run, for when Slurm has forgotten it."""
    lines = [f"{_OF}{folder.resolve()}", *jobs(folder), job]
    write_text(folder / JOBS, "".join(f"{line}\n" for line in lines))


def jobs(folder: Path) -> list[str]:
    """Numbers of all jobs that a run was ever submitted as: 42, 42_3 of an array, 42;name of a cluster."""
    file = folder / JOBS
    lines = file.read_text(errors="replace").split("\n") if file.exists() else []
    if lines and lines[0].startswith(_OF) and _is_copy(folder, lines[0].removeprefix(_OF)):
        return []
    return [line for line in lines if _NUMBER.fullmatch(line)]


def _is_copy(folder: Path, of: str) -> bool:
    """Whether a run is a copy of the one whose jobs are written down: they are that one's alone."""
    return os.path.isdir(of) and not os.path.samefile(of, folder)


def is_number(job: str) -> bool:
    """Whether it is written as `jobs` has them."""
    return _NUMBER.fullmatch(job) is not None


def task(job: str, index: int) -> str:
    """The number of a job of an array."""
    number, semicolon, cluster = job.partition(";")
    return f"{number}_{index}{semicolon}{cluster}"


def cancel(job: str) -> None:
    """Ends a job. Raises SlurmError."""
    _asked("scancel", job)


def ask_to_save(job: str) -> None:
    """Tells a running job's batch script that it is to save and end. Raises SlurmError."""
    _asked("scancel", job, "--batch", "--signal=USR1")


def queue(wanted: Sequence[str]) -> tuple[dict[str, Job], dict[str, str]]:
    """What Slurm knows of jobs, by number, and why it was not heard about others.

    Those that it has forgotten are in neither.
    """
    known: dict[str, Job] = {}
    unheard: dict[str, str] = {}
    clusters = sorted({job.partition(";")[2] for job in wanted})
    for cluster in clusters:
        asked = [job for job in wanted if job.partition(";")[2] == cluster]
        end = f";{cluster}" if cluster else ""
        numbers = ",".join(job.removesuffix(end) for job in asked) + end
        try:
            lines = _asked("squeue", numbers, "-h", "-r", "-t", "all", "-o", "%i|%T|%N|%L|%r")
        except SlurmError as error:
            unheard |= dict.fromkeys(asked, str(error))
            continue
        for line in lines:
            number, *rest = line.split("|", 4)
            if len(rest) == 4:  # else a banner
                state, nodes, left, reason = rest
                name = number.partition("+")[0] + end  # 12+0: of a heterogeneous job
                known.setdefault(name, Job(state, reason, nodes, left))
    return known, unheard


def details(job: str) -> dict[str, str]:
    """What `scontrol show job` says; nothing if Slurm has forgotten it. Raises SlurmError."""
    lines = [line for line in _asked("scontrol", job) if line.startswith("JobId=")]
    # Names of files may have spaces in them.
    return dict(re.findall(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)", (*lines, "")[0]))


def _asked(command: str, job: str, *options: str) -> list[str]:
    """The lines of an answer about a job, or several; none if Slurm knows no such job any more."""
    numbers, _, cluster = job.partition(";")
    which = {"squeue": ["-j", numbers], "scancel": [numbers]}
    which["scontrol"] = ["-o", "show", "job", numbers]
    where = [f"--clusters={cluster}"] if cluster else []
    # The user's own defaults would hide jobs, and ask before they cancel.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SQUEUE_", "SCANCEL_"))
    }
    try:
        return _slurm(environment, command, *where, *options, *which[command]).stdout.splitlines()
    except SlurmError as error:
        if any(gone in str(error) for gone in _GONE):
            return []
        raise


def available() -> bool:
    """Whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None


def _sbatch(option: str, script: Path) -> subprocess.CompletedProcess[str]:
    environment = sbatch.shell(os.environ, script.read_text())
    try:
        return _slurm(environment, "sbatch", option, str(script))
    except SlurmSilent as error:
        raise SlurmError(
            f"{error}. It may take the job all the same: look with squeue --me before you submit it again"
        ) from None


def _slurm(environment: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on this machine: submit from a cluster's login node")
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{command[0]} did not answer in {TIMEOUT_S} s") from None
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]}: {said.removeprefix(f'{command[0]}: ')}")
    return done


def _preflight(slurm: Slurm) -> Step | None:
    """A task on each node; none without MPI, nor with one node, nor in a heterogeneous job."""
    nodes = slurm.learner_nodes + slurm.rollout_nodes
    if slurm.mpi == "none" or nodes == 1 or slurm.rollout_partition is not None:
        return None
    return Step(nodes, nodes, None)


def _quoted(value: object) -> str:
    """One word of bash. shlex leaves commas bare, which in an array look like a mistake."""
    word = shlex.quote(str(value))
    return f"'{word}'" if "," in word and word == str(value) else word


def _mounts(slurm: Slurm, folder: Path) -> str:
    mounts = [f"{folder}:{folder}", f"{PROJECT}:{PROJECT}", *slurm.container.mounts]
    for mount in mounts:
        if "," in mount or mount.count(":") > 2:
            raise RecipeError(
                f"slurm.container: {mount!r} cannot be mounted, since , and : part mounts: choose a path "
                "without them"
            )
    return ",".join(mounts)


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
