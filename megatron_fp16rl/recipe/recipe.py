"""The recipe itself, and what its sections must agree about."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_fp16rl.recipe import notation
from megatron_fp16rl.recipe.algorithm import Algorithm
from megatron_fp16rl.recipe.learner import Learner, Optimizer, Precision
from megatron_fp16rl.recipe.rollout import Rollout, Sync
from megatron_fp16rl.recipe.section import AsMeant, Fraction, Seconds, Section, multiples
from megatron_fp16rl.recipe.slurm import Slurm, check_nodes
from megatron_fp16rl.recipe.tasks import AdditionTask, DatasetTask, ReasoningGymTask


class BuildModel(Section):
    """A random model made from a Hugging Face configuration, with a character-level tokenizer."""

    config: Annotated[dict[str, object], AsMeant] = Field(
        description="Hugging Face config; model_type names the family"
    )
    alphabet: str = Field(min_length=1, description="characters the tokenizer knows, in id order")
    seed: int = 0


class Model(Section):
    path: str | None = Field(None, description="Hugging Face folder, or name in the local cache")
    shape: str | None = Field(
        None,
        description="a config.json of the model at path, to plan and rehearse with where that is not; "
        "seen from the file that names it",
    )
    build: BuildModel | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        if (self.path is None) == (self.build is None):
            raise ValueError("give either path or build")
        if self.shape is not None and self.path is None:
            raise ValueError("shape goes with path, not with build")
        return self


class Checkpoint(Section):
    """When the learner's whole state is saved, and which checkpoints are kept. The last step's is."""

    every: PositiveInt = Field(50, description="steps")
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = Field(
        None, description="checkpoints at multiples of this many steps are kept for good"
    )


class WarmStart(Section):
    """Supervised steps before RL, until the expected sampled accuracy on held-out prompts."""

    accuracy: Fraction = 0.3
    noise: Fraction = Field(
        0.0, description="share of the answers' tokens replaced by another answer's, at random"
    )
    max_updates: PositiveInt = 1000
    check_every: PositiveInt = 10
    global_batch_size: PositiveInt = 128
    optimizer: Optimizer = Optimizer(lr=1e-3)


class Gate(Section):
    """An alarm on a metric: when its mean over the last `window` steps that have it is out of bounds."""

    metric: str = Field(description="as in metrics.jsonl, e.g. mismatch/kl_k3")
    above: float | None = None
    below: float | None = None
    window: PositiveInt = 1
    action: Literal["warn", "stop"] = "warn"
    at_end: bool = Field(False, description="judged once, after the last step: a mark to reach")

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Gate":
        if self.at_end and self.action == "stop":
            raise ValueError("at_end: there is nothing left to stop; remove action")
        if self.above is None and self.below is None:
            raise ValueError("give above, below or both")
        return self


class Suite(Section):
    """Problems that are asked now and then in training, on the rollout servers."""

    suite: str = Field(description="FILE:METRIC as for fp16rl eval, e.g. aime.jsonl:avg@4")
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Fraction = 1.0
    max_new_tokens: PositiveInt | None = Field(None, description="default: the rollouts'")
    problems: PositiveInt | None = Field(None, description="at most so many")


Origin = Annotated[
    str,
    Field(
        pattern=r"^(paper|public run|planner|ours|untested|run here)\b",
        description="paper, public run, planner, ours, untested or run here; then which, or what of it",
    ),
]


class Provenance(Section):
    """Where a recipe's numbers come from. `run here` is said of nothing that was not run."""

    algorithm: Origin = Field(description="algorithm, batch sizes, lengths, learning rate")
    layout: Origin = Field(description="nodes, parallelism, recomputation, micro-batches")
    run: Origin = "untested"


class Trainer(Section):
    steps: Annotated[int, Field(ge=0)]
    seed: int = 0
    eval_every: PositiveInt = 25
    eval_prompts: PositiveInt = 512
    suites: list[Suite] = Field([], description="asked whenever the held-out prompts are")
    run_root: str = "runs"
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3,
        description="times that ranks that died or hang go on from the last checkpoint, in one job; "
        "fewer if twice in a row they made no step that was not made before",
    )
    step_timeout_s: Seconds | None = Field(
        3600,
        description="a step that takes longer is a hang: stacks, then the end; null: none is. The start, "
        "while models load, has rollout.start_timeout_s more; waiting for servers does not count",
    )


class Recipe(Section):
    base: str | None = None
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="of the run's directory",
    )
    description: str = ""
    provenance: Provenance | None = None
    model: Model
    task: Annotated[AdditionTask | DatasetTask | ReasoningGymTask, Field(discriminator="kind")]
    rollout: Rollout
    algorithm: Algorithm = Algorithm()
    learner: Learner
    precision: Precision = Precision()
    sync: Sync = Sync()
    checkpoint: Checkpoint = Checkpoint()
    warm_start: WarmStart | None = None
    trainer: Trainer
    gates: list[Gate] = Field([])
    slurm: Slurm | None = None

    @model_validator(mode="after")
    def _nodes_hold_everything(self) -> "Recipe":
        if self.slurm is not None:
            check_nodes(self.slurm, self.learner.ranks, self.rollout)
        return self

    @model_validator(mode="after")
    def _patience_outlasts_a_sync(self) -> "Recipe":
        if self.rollout.health_timeout_s < self.sync.timeout_s:
            raise ValueError(
                f"rollout.health_timeout_s={self.rollout.health_timeout_s:g} is below "
                f"sync.timeout_s={self.sync.timeout_s:g}: a server does not answer while it takes "
                "weights, and would be killed for it; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _batches_agree(self) -> "Recipe":
        ranks, rollout = self.learner.data_parallel, self.rollout
        sequences = rollout.prompts * rollout.samples
        compares = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
        if self.algorithm.advantage in compares and rollout.samples < 2:
            raise ValueError(
                f"rollout.samples must be at least 2: {self.algorithm.advantage} compares the "
                "samples of a prompt"
            )
        overlong = self.algorithm.overlong
        if overlong is not None and overlong.buffer > rollout.max_new_tokens:
            raise ValueError(
                f"algorithm.overlong.buffer={overlong.buffer} is more than "
                f"rollout.max_new_tokens={rollout.max_new_tokens}"
            )
        if rollout.prompts % ranks:
            raise ValueError(
                f"rollout.prompts={rollout.prompts} is not a multiple of the {ranks} data-parallel "
                f"ranks; nearest: {multiples(rollout.prompts, ranks)}"
            )
        batch = self.learner.global_batch_size
        if sequences % batch or batch % ranks:
            most = min(sequences, 1_000_000)  # what is larger is a slip
            good = [n for n in range(ranks, most + 1, ranks) if sequences % n == 0]
            nearest = sorted(sorted(good, key=lambda n: abs(n - batch))[:3])
            raise ValueError(
                f"learner.global_batch_size={batch} must divide the {sequences} sequences of a step "
                f"(rollout.prompts x rollout.samples) and be a multiple of the {ranks} "
                f"data-parallel ranks; nearest: {', '.join(map(str, nearest))}"
            )
        return self

    @model_validator(mode="after")
    def _replay_reaches_the_router(self) -> "Recipe":
        options = self.learner.megatron
        if self.rollout.router_replay and (
            options.get("moe_router_fusion")
            or options.get("moe_router_load_balancing_type") == "sinkhorn"
        ):
            raise ValueError(
                "rollout.router_replay: Megatron's fused router and its sinkhorn router choose for "
                "themselves; remove moe_router_fusion and moe_router_load_balancing_type from "
                "learner.megatron"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `load` reads it back unchanged."""
        return notation.write(self.model_dump(mode="json", exclude={"base"}))
