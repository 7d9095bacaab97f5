"""What a job asks of the cluster."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from megatron_fp16rl.recipe.values import NonNegativeInt, PositiveInt, Section

_READ_ONLY = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}  # bash's own
_SET_BY_US = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# Keys of earlier versions, which are options of sbatch.
_FORMER_KEYS = (
    *("account", "partition", "qos", "constraint"),
    *("exclude", "reservation", "comment", "mail_user"),
)
_LOG = "fp16rl status reads logs/slurm.out of the run directory"
_DEVICES = "each process is told which devices are its own"
# Options of sbatch that we write ourselves or that would break the script, and what to set instead.
_SET_ELSEWHERE = {
    **{name: f"slurm.{name.replace('-', '_')}" for name in ("gpus-per-node", "gres", "time")},
    **dict.fromkeys(("error", "open-mode", "output"), _LOG),
    **dict.fromkeys(("gpus", "gpus-per-socket"), "slurm.gpus_per_node"),
    "array": "fp16rl submit --sweep",
    "chdir": f"cd in slurm.setup; {_LOG}",
    "clusters": "SLURM_CLUSTERS, for submit, status and cancel alike",
    "gpu-bind": _DEVICES,
    "gpus-per-task": f"slurm.gpus_per_node; {_DEVICES}",
    "job-name": "fp16rl submit --name",
    "nodes": "slurm.learner_nodes and slurm.rollout_nodes",
    "parsable": "it is of sbatch's command line",
    "signal": "slurm.warn_s",
    "test-only": "fp16rl submit --dry-run",
    "wait": "fp16rl status --watch",
    "wrap": "slurm.setup",
}


def _refuse(pattern: str, message: str) -> AfterValidator:
    """Refuses text with a match of a pattern. message: of what was matched, as {}."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if match := compiled.search(text):
            raise ValueError(message.format(repr(match[0])))
        return text

    return AfterValidator(check)


# `time: 90`, `environment: {NCCL_IB_DISABLE: 1}`: whole numbers are text as they are written.
_DIGITS_ARE_TEXT = BeforeValidator(lambda value: str(value) if type(value) is int else value)
# What no line of a batch script can hold, and (the last range) no file.
_CONTROLS = r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]"
_TIME = r"([0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE)\Z"
Line = Annotated[
    str, _refuse(_CONTROLS, "holds {}; write it on one line (in YAML, >- joins lines)")
]
Word = Annotated[Line, _refuse(r"^$", "is empty; what is not asked for is null")]
ModuleName = Annotated[Word, _refuse(r"\s", "is the name of one module; write a list of names")]
_EXPANDED = r"\$[A-Za-z_{(]|`|^~(/|$)|:~/"  # by bash, where no quotes are
Literally = Annotated[
    Line,
    _DIGITS_ARE_TEXT,
    _refuse(
        _EXPANDED,
        "is taken literally, {} too; to have bash expand it, write a line of "
        'slurm.setup: ["export NAME=..."]',
    ),
]
Image = Annotated[Word, _refuse(_EXPANDED, "is taken literally, {} too: write it out")]
Mount = Annotated[
    Image, _refuse(r"^[^/].*|^[^:]+:[^/].*", "{} is no SOURCE:TARGET with absolute paths")
]
BashLine = Annotated[
    str,
    _refuse(rf"(?![\n\t]){_CONTROLS}", "holds {}, which bash cannot read"),
    _refuse(r"^\s*#SBATCH", "Slurm would not see it here; write it as slurm.options: {{mem: 0}}"),
]
Duration = Annotated[
    str,
    _DIGITS_ARE_TEXT,
    _refuse(
        rf"^(?!(?i:{_TIME})).*",
        "is no time of Slurm's: write MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, "
        "DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS or UNLIMITED",
    ),
]


class Container(Section):
    """For nodes whose own Python will not do."""

    image: Image
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[Mount] = Field([])  # SOURCE:TARGET; the run directory is mounted anyway


Gpu = Literal["h100-80gb", "h200", "b200", "a100-80gb", "mi300x"]


class Slurm(Section):
    """The resources of a job, in Slurm's words."""

    time: Duration = "24:00:00"  # minutes, hours:minutes:seconds, days-hours
    learner_nodes: PositiveInt = 1
    rollout_nodes: NonNegativeInt = 0  # 0: servers take the devices that the ranks leave
    gpus_per_node: NonNegativeInt = 8
    gpu: Gpu = "h100-80gb"  # of the nodes, for fp16rl plan
    gres: Word | None = None  # in place of --gpus-per-node, e.g. gpu:h100:8
    mpi: Literal["none", "pmi2", "pmix"] = "none"  # how the preflight's mpi4py ranks connect
    interface: Word | None = None  # network interface, e.g. ib0; null: that of the node's name
    warn_s: PositiveInt = 300  # before the time limit: the run saves and is requeued
    container: Container | None = None
    modules: list[ModuleName] = Field([])
    # variables and their values, taken literally; null takes back a base's
    environment: dict[str, Literally | None] = Field({})
    setup: list[BashLine] = Field([])  # lines of bash before anything starts
    # of sbatch, by their long names: {account: me, partition: gpu, exclude: node7}; null takes back a base's
    options: dict[str, Word | int | bool | None] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _former_keys_are_options(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        for key in _FORMER_KEYS:
            if (value := section.get(key)) is not None:
                text = value if isinstance(value, str) else "..."  # 1.10 is no text any more
                option = key.replace("_", "-")
                more = ", mail-type: 'END,FAIL'" if key == "mail_user" else ""
                raise ValueError(
                    f"{key} is an option of sbatch: write slurm.options: {{{option}: {text}{more}}}"
                )
        if section.get("rollout_partition") is not None:
            raise ValueError(
                "rollout_partition: a job has one partition (slurm.options: {partition: ...}), and servers "
                "run in it, on slurm.rollout_nodes; remove it"
            )
        # Runs of earlier versions have these keys as null.
        former = {*_FORMER_KEYS, "rollout_partition"}
        return {key: value for key, value in section.items() if key not in former}

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        environment = {name: value for name, value in environment.items() if value is not None}
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} cannot be a variable of bash: letters, digits and _")
            if name in _READ_ONLY:
                raise ValueError(f"bash does not let {name} be set; remove it")
            if name in _SET_BY_US:
                raise ValueError(f"fp16rl tells each process its {name}; remove it")
        return environment

    @field_validator("options")
    @classmethod
    def _are_not_set_elsewhere(
        cls, options: dict[str, str | int | bool]
    ) -> dict[str, str | int | bool]:
        options = {name: value for name, value in options.items() if value is not None}
        for name in options:
            if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) == 1:
                raise ValueError(f"{name!r} is no option of sbatch by its long name, such as mem")
            if owner := reserved(name):
                raise ValueError(f"{name}: fp16rl sets that itself; remove it ({owner})")
        return options

    @property
    def nodes(self) -> int:
        """Of the whole job."""
        return self.learner_nodes + self.rollout_nodes

    def devices(self, ranks: int, server_gpus: int) -> dict[str, tuple[int, int]]:
        """GPUs that are needed, and nodes that have them, by whom they are for."""
        if not self.rollout_nodes:
            return {"learner": (ranks + server_gpus, self.learner_nodes)}
        return {
            "learner": (ranks, self.learner_nodes),
            "rollout": (server_gpus, self.rollout_nodes),
        }

    @property
    def seconds(self) -> float:
        """The time limit; 0 means none, for Slurm too."""
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
    """What replaces an option of sbatch that a recipe cannot pass on; None if it can.

    sbatch takes an option by its first letters, too: --arr is --array.
    """
    return next((owner for name, owner in _SET_ELSEWHERE.items() if name.startswith(option)), None)


def check_nodes(slurm: Slurm, ranks: int, server_gpus: int) -> None:
    """Raises ValueError unless the nodes divide the ranks and have devices for ranks and servers."""
    nodes, gpus = slurm.learner_nodes, slurm.gpus_per_node
    if ranks % nodes:
        raise ValueError(
            f"slurm.learner_nodes={nodes} does not divide learner.ranks={ranks}; "
            f"nearest: {', '.join(str(n) for n in range(1, min(ranks, 10_000) + 1) if ranks % n == 0)}"
        )
    if slurm.seconds <= slurm.warn_s:
        raise ValueError(
            f"slurm.time={slurm.time} is {slurm.seconds:g} s and slurm.warn_s={slurm.warn_s}: the job "
            "would be told to stop as soon as it starts; raise the first or lower the second"
        )
    for name, (needed, count) in slurm.devices(ranks, server_gpus).items():
        if gpus and needed > count * gpus:
            raise ValueError(
                f"slurm.{name}_nodes={count} x gpus_per_node={gpus} are {count * gpus} GPUs, but "
                f"{needed} are needed (learner.ranks={ranks}, rollout.servers x tensor_parallel="
                f"{server_gpus}); {-(-needed // gpus)} nodes would do"
            )
