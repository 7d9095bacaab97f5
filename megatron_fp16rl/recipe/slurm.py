"""What a job asks of the cluster."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from megatron_fp16rl.recipe.rollout import Rollout
from megatron_fp16rl.recipe.section import Section


class Container(Section):
    """Where the nodes' own Python will not do. The image holds this repository's environment."""

    image: str
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[str] = Field([], description="SOURCE:TARGET; the run directory is mounted anyway")


Gpu = Literal["h100-80gb", "h200", "b200", "a100-80gb", "mi300x"]


class Slurm(Section):
    """What a job asks of Slurm. Words that Slurm has are Slurm's."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    comment: str | None = None
    mail_user: str | None = None
    time: str = Field(
        "24:00:00",
        pattern=r"^(\d+-)?\d+(:\d\d){0,2}$",
        coerce_numbers_to_str=True,
        description="as Slurm has it: minutes, hours:minutes:seconds, days-hours",
    )
    learner_nodes: PositiveInt = 1
    rollout_nodes: Annotated[int, Field(ge=0)] = Field(
        0, description="0: servers run on the learner's nodes, on the devices that its ranks leave"
    )
    rollout_partition: str | None = Field(
        None, description="of the rollout nodes, where it is another; makes a heterogeneous job"
    )
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    gpu: Gpu = Field("h100-80gb", description="that the nodes have: what fp16rl plan reckons with")
    gres: str | None = Field(
        None, description="asked for in place of --gpus-per-node, e.g. gpu:h100:8"
    )
    mpi: Literal["none", "pmi2", "pmix"] = Field(
        "none", description="how mpi4py's ranks of the preflight find each other"
    )
    interface: str | None = Field(
        None, description="network interface of the nodes, e.g. ib0; default: that of their names"
    )
    warn_s: PositiveInt = Field(
        300, description="seconds before the time limit at which a run saves and requeues itself"
    )
    container: Container | None = None
    modules: list[str] = Field([])
    environment: dict[str, str] = Field({})
    setup: list[str] = Field([], description="lines of bash before anything starts")
    options: dict[str, str | int | bool] = Field(
        {}, description="passed on to sbatch, e.g. {switches: 1}"
    )


def check_nodes(slurm: Slurm, ranks: int, rollout: Rollout) -> None:
    """Raises ValueError unless the nodes divide the ranks and have devices for all."""
    nodes, gpus = slurm.learner_nodes, slurm.gpus_per_node
    if ranks % nodes:
        raise ValueError(
            f"slurm.learner_nodes={nodes} does not divide learner.ranks={ranks}; "
            f"nearest: {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}"
        )
    if slurm.rollout_partition and not slurm.rollout_nodes:
        raise ValueError("slurm.rollout_partition needs slurm.rollout_nodes")
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
