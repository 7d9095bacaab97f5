"""What a job asks of the cluster."""

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator

from megatron_fp16rl.recipe.rollout import Rollout
from megatron_fp16rl.recipe.section import Section

# What no line of a batch script can hold, and (the last) no file.
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_EXPANDS = re.compile(r"\$[A-Za-z_{(]|`|^~(/|$)|:~/")
# Of bash itself, which does not let them be set.
_READ_ONLY = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
_TOLD = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LOG = "fp16rl status reads logs/slurm.out of the run directory"
_OWN = "each process is told which devices are its own"
# What a batch script asks for anyway, or what would make it something else; and what to set instead.
_SET_ELSEWHERE = {
    "account": "slurm.account",
    "array": "fp16rl submit --sweep",
    "chdir": f"cd in slurm.setup; {_LOG}",
    "comment": "slurm.comment",
    "constraint": "slurm.constraint",
    "error": _LOG,
    "exclude": "slurm.exclude",
    "gpu-bind": _OWN,
    "gpus": "slurm.gpus_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "gpus-per-socket": "slurm.gpus_per_node",
    "gpus-per-task": f"slurm.gpus_per_node; {_OWN}",
    "gres": "slurm.gres",
    "job-name": "fp16rl submit --name",
    "mail-user": "slurm.mail_user",
    "nodes": "slurm.learner_nodes and slurm.rollout_nodes",
    "open-mode": _LOG,
    "output": _LOG,
    "parsable": "it is of sbatch's command line",
    "partition": "slurm.partition and slurm.rollout_partition",
    "qos": "slurm.qos",
    "reservation": "slurm.reservation",
    "signal": "slurm.warn_s",
    "test-only": "fp16rl submit --dry-run",
    "time": "slurm.time",
    "wait": "fp16rl status --watch",
    "wrap": "slurm.setup",
}


def _one_line(value: str) -> str:
    if found := _UNWRITABLE.search(value):
        raise ValueError(f"holds {found[0]!r}; write it on one line (in YAML, >- joins lines)")
    return value


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("is empty; what is not asked for is null")
    return value


def _bash(line: str) -> str:
    if found := _UNWRITABLE.search(line.replace("\n", "").replace("\t", "")):
        raise ValueError(f"holds {found[0]!r}, which bash cannot read")
    if line.lstrip().startswith("#SBATCH"):
        raise ValueError("Slurm would not see it here; write it as slurm.options: {mem: 0}")
    return line


def _module(name: str) -> str:
    if re.search(r"\s", name):
        raise ValueError(f"is the name of one module; write {name.split()}")
    return name


def _literal(value: str) -> str:
    if found := _EXPANDS.search(value):
        raise ValueError(
            f"is taken literally, {found[0]!r} too; to have bash expand it, write a line of "
            'slurm.setup: ["export NAME=..."]'
        )
    return value


def _duration(time: str) -> str:
    if not _TIME.fullmatch(time):
        raise ValueError(
            "is no time of Slurm's: write MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, "
            "DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS or UNLIMITED"
        )
    return time


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[Line, AfterValidator(_not_empty)]


class Container(Section):
    """Where the nodes' own Python will not do. The image holds this repository's environment."""

    image: Word
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[Word] = Field([], description="SOURCE:TARGET; the run directory is mounted anyway")


Gpu = Literal["h100-80gb", "h200", "b200", "a100-80gb", "mi300x"]


class Slurm(Section):
    """What a job asks of Slurm. Words that Slurm has are Slurm's."""

    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    reservation: Word | None = None
    comment: Word | None = None
    mail_user: Word | None = None
    time: Annotated[str, AfterValidator(_duration)] = Field(
        "24:00:00", description="as Slurm has it: minutes, hours:minutes:seconds, days-hours"
    )
    learner_nodes: PositiveInt = 1
    rollout_nodes: Annotated[int, Field(ge=0)] = Field(
        0, description="0: servers run on the learner's nodes, on the devices that its ranks leave"
    )
    rollout_partition: Word | None = Field(
        None, description="of the rollout nodes, where it is another; makes a heterogeneous job"
    )
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    gpu: Gpu = Field("h100-80gb", description="that the nodes have: what fp16rl plan reckons with")
    gres: Word | None = Field(
        None, description="asked for in place of --gpus-per-node, e.g. gpu:h100:8"
    )
    mpi: Literal["none", "pmi2", "pmix"] = Field(
        "none", description="how mpi4py's ranks of the preflight find each other"
    )
    interface: Word | None = Field(
        None, description="network interface of the nodes, e.g. ib0; default: that of their names"
    )
    warn_s: PositiveInt = Field(
        300, description="seconds before the time limit at which a run saves and requeues itself"
    )
    container: Container | None = None
    modules: list[Annotated[Word, AfterValidator(_module)]] = Field([])
    environment: dict[str, Annotated[Line, AfterValidator(_literal)]] = Field(
        {}, description="variables and their values, taken literally"
    )
    setup: list[Annotated[str, AfterValidator(_bash)]] = Field(
        [], description="lines of bash before anything starts; one that fails ends the job"
    )
    options: dict[str, Word | int | bool] = Field(
        {}, description="passed on to sbatch, e.g. {switches: 1}"
    )

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} cannot be a variable of bash: letters, digits and _")
            if name in _READ_ONLY:
                raise ValueError(f"bash does not let {name} be set; remove it")
            if name in _TOLD:
                raise ValueError(f"fp16rl tells each process its {name}; remove it")
        return environment

    @field_validator("options")
    @classmethod
    def _are_not_set_elsewhere(
        cls, options: dict[str, str | int | bool]
    ) -> dict[str, str | int | bool]:
        for name in options:
            if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) == 1:
                raise ValueError(f"{name!r} is no option of sbatch by its long name, such as mem")
            if owner := reserved(name):
                raise ValueError(f"{name}: fp16rl sets that itself; remove it ({owner})")
        return options

    @property
    def seconds(self) -> float:
        """The time limit; 0 is none, for Slurm too."""
        if not self.time[0].isdigit():
            return math.inf
        days, dash, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if dash or len(parts) == 3:  # from the hours on
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:
            hours, (minutes, seconds) = 0, (*parts, 0)[:2]
        limit = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        return limit or math.inf


def reserved(option: str) -> str | None:
    """What stands for an option of sbatch that a recipe cannot pass on.

    sbatch knows its options by their beginnings, too: --arr is --array.
    """
    return next((said for own, said in _SET_ELSEWHERE.items() if own.startswith(option)), None)


def check_nodes(slurm: Slurm, ranks: int, rollout: Rollout) -> None:
    """Raises ValueError unless the nodes divide the ranks and have devices for all."""
    nodes, gpus = slurm.learner_nodes, slurm.gpus_per_node
    if ranks % nodes:
        raise ValueError(
            f"slurm.learner_nodes={nodes} does not divide learner.ranks={ranks}; "
            f"nearest: {', '.join(str(n) for n in range(1, min(ranks, 10_000) + 1) if ranks % n == 0)}"
        )
    if slurm.rollout_partition and not slurm.rollout_nodes:
        raise ValueError("slurm.rollout_partition needs slurm.rollout_nodes")
    if slurm.seconds <= slurm.warn_s:
        raise ValueError(
            f"slurm.time={slurm.time} is {slurm.seconds:g} s and slurm.warn_s={slurm.warn_s}: the job "
            "would be told to stop as soon as it starts; raise the first or lower the second"
        )
    if not gpus:
        return
    wanted = rollout.servers * rollout.tensor_parallel
    if slurm.rollout_nodes:
        needs = {"learner": (ranks, nodes), "rollout": (wanted, slurm.rollout_nodes)}
    else:
        needs = {"learner": (ranks + wanted, nodes)}
    for name, (devices, count) in needs.items():
        if devices > count * gpus:
            raise ValueError(
                f"slurm.{name}_nodes={count} x gpus_per_node={gpus} are {count * gpus} GPUs, but "
                f"{devices} are needed (learner.ranks={ranks}, rollout.servers x tensor_parallel="
                f"{wanted}); {-(-devices // gpus)} nodes would do"
            )
