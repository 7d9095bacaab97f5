"""The sections of a recipe in the order of a file, then the recipe and what its sections must agree about.

The comment at a key is its description in docs/recipe-keys.md. The larger sections are in tasks.py,
algorithm.py, learner.py and slurm.py.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from megatron_fp16rl.recipe import notation
from megatron_fp16rl.recipe.algorithm import Algorithm
from megatron_fp16rl.recipe.learner import Learner, Optimizer, Precision
from megatron_fp16rl.recipe.slurm import Slurm, check_nodes
from megatron_fp16rl.recipe.tasks import EnvironmentTask, Task
from megatron_fp16rl.recipe.values import (
    HIDDEN,
    Float,
    Fraction,
    Int,
    NonEmpty,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    multiples,
)

_ABSENT, _SECRET = "(absent)", "slurm.environment."


class BuildModel(Section):
    """A random model made from a Hugging Face configuration, with a character-level tokenizer."""

    config: Options  # of Hugging Face; model_type names the family
    alphabet: str = Field(min_length=1)  # characters the tokenizer knows, in id order
    seed: Int = 0


class Model(Section):
    path: str | None = None  # Hugging Face folder, or name in the local cache
    shape: str | None = None  # config.json to plan with where path is not
    build: BuildModel | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> "Model":
        if (self.path is None) == (self.build is None):
            raise ValueError("give either path or build")
        if self.shape is not None and self.path is None:
            raise ValueError("shape goes with path, not with build")
        return self


class Rollout(Section):
    """What is sampled in a step, and the servers that sample it."""

    prompts: PositiveInt  # per step, over all data-parallel ranks
    samples: PositiveInt  # per prompt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    stop: list[NonEmpty] = Field([])  # a response ends with the first of these, and keeps it
    # 1: the next step is sampled while this one is learnt; more: responses go on over so many updates at most
    ahead: NonNegativeInt = 0
    refill_rounds: NonNegativeInt = 0  # of replacing prompts whose samples all earn the same
    record: bool = False  # keep every sample in rollouts/ of the run directory
    replay: str | None = None  # a recorded rollouts/ folder, in place of servers
    router_replay: bool = False  # the learner takes the experts that SGLang chose
    # your own, in place of sampling: my_rollout.py:rollout, docs/environments.md
    function: str | None = Field(None, pattern=r"^.+\.py:\w+$")
    servers: PositiveInt = 1
    tensor_parallel: PositiveInt = 1  # ranks of one server
    host: str = "127.0.0.1"
    deterministic: bool = False  # samples depend on seed, step and prompt alone; slower on a GPU
    start_timeout_s: Seconds = 1800  # the first start on a GPU compiles kernels
    request_timeout_s: Seconds = 600
    health_timeout_s: Seconds = 180  # a server that is silent for so long is restarted
    max_restarts: NonNegativeInt = 10  # of one server, in a run
    wait_for_servers_s: Seconds = 900  # for one to come back when all are gone
    # passed on to sglang.launch_server
    sglang: dict[str, str | int | float | bool] = Field({})


_NOT_SLICED = (  # options of servers of several models, replicas or stages
    "speculative_algorithm",
    "data_parallel_size",
    "dp_size",
    "dp",
    "pipeline_parallel_size",
    "pp_size",
    "pp",
)


class Sync(Section):
    # sliced: each server rank gets what it keeps; distributed: whole tensors from rank 0; disk: a shared folder
    transport: Literal["sliced", "distributed", "disk"] = "sliced"
    bucket_mib: PositiveInt = 1024  # memory for weights on their way
    timeout_s: Seconds = 120
    # syncs after which log-probs are compared; a number: the first and every N-th
    verify: Literal["never", "first", "always"] | PositiveInt = "first"
    # log the share of numbers that a sync changed; a copy of the weights stays in host memory
    count_changes: bool = False

    @property
    def message_bytes(self) -> int:
        """Of a message of `sliced`, at most; two are held. Larger ones would be no faster."""
        return min((self.bucket_mib << 20) // 2, 64 << 20)


class Checkpoint(Section):
    """When the learner's whole state is saved, the last step's always, and what is kept."""

    every: PositiveInt = 50  # steps
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None  # steps; multiples of it are kept for good
    # written from a copy in host memory while training goes on
    background: bool = False


class WarmStart(Section):
    """Supervised steps before RL, until the expected sampled accuracy on held-out prompts."""

    accuracy: Fraction = 0.3
    noise: Fraction = 0.0  # share of the answers' tokens replaced by another answer's
    max_updates: PositiveInt = 1000
    check_every: PositiveInt = 10
    global_batch_size: PositiveInt = 128
    optimizer: Optimizer = Optimizer(lr=1e-3)


class Suite(Section):
    """Problems that are evaluated in training, on the rollout servers."""

    # Sources that are no files: the problems of a recipe's own task.
    HELD_OUT: ClassVar = "held-out"
    TRAINING: ClassVar = "training"

    suite: str  # FILE:METRIC as for fp16rl eval, e.g. aime.jsonl:avg@4
    temperature: NonNegativeFloat = 1.0
    top_p: Fraction = 1.0
    max_new_tokens: PositiveInt | None = None  # null: the rollouts'
    problems: PositiveInt | None = None  # at most so many

    @field_validator("suite")
    @classmethod
    def _check_suite(cls, text: str) -> str:
        if not re.fullmatch(r".+:((avg|pass)@[1-9]\d*|greedy)", text):
            raise ValueError(
                "write FILE:METRIC with METRIC one of avg@K, pass@K or greedy, e.g. "
                f"aime.jsonl:avg@32; for FILE also {cls.HELD_OUT} or {cls.TRAINING}"
            )
        return text

    @property
    def source(self) -> str:
        """A JSONL or Parquet file, HELD_OUT or TRAINING."""
        return self.suite.rpartition(":")[0]

    @property
    def is_file(self) -> bool:
        return self.source not in (self.HELD_OUT, self.TRAINING)

    @property
    def name(self) -> str:
        """The source, without folders and endings."""
        return Path(self.source).stem if self.is_file else self.source

    @property
    def label(self) -> str:
        """The metric as it is written, e.g. avg@32."""
        return self.suite.rpartition(":")[2]

    @property
    def metric(self) -> str:
        """avg, pass or greedy."""
        return self.label.partition("@")[0]

    @property
    def k(self) -> int:
        """The number of tries that the metric is about."""
        return int(self.label.partition("@")[2] or 1)

    @property
    def greedy(self) -> bool:
        return self.metric == "greedy"


class Trainer(Section):
    steps: NonNegativeInt
    seed: Int = 0
    eval_every: PositiveInt = 25
    eval_prompts: PositiveInt = 512
    suites: list[Suite] = Field([])  # evaluated whenever the held-out prompts are
    run_root: str = "runs"
    max_restarts: NonNegativeInt = 3  # of ranks that died or hung, since the last checkpoint
    # a longer step is a hang; null: no limit. Waiting for servers does not count
    step_timeout_s: Seconds | None = 3600


class Gate(Section):
    """A threshold on a metric: on its mean over the last `window` steps that have it."""

    metric: str  # as in metrics.jsonl, e.g. mismatch/kl_k3
    above: Float | None = None
    below: Float | None = None
    window: PositiveInt = 1
    action: Literal["warn", "stop"] = "warn"
    at_end: bool = False  # only after the last step: a mark to reach

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Gate":
        if self.at_end and self.action == "stop":
            raise ValueError("at_end: there is nothing left to stop; remove action")
        if self.above is None and self.below is None:
            raise ValueError("give above, below or both")
        return self


Origin = Annotated[str, Field(pattern=r"^(paper|public run|planner|ours|untested|run here)\b")]


class Provenance(Section):
    """Where numbers come from: paper, public run, planner, ours, untested or run here; then which."""

    algorithm: Origin  # algorithm, batch sizes, lengths, learning rate
    layout: Origin  # nodes, parallelism, recomputation, micro-batches
    run: Origin = "untested"  # run here: only of what was run here


class Recipe(Section):
    base: str | None = None  # the recipe that this one changes
    # of the run directory
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    description: str = ""
    provenance: Provenance | None = None
    model: Model
    task: Annotated[Task, Field(discriminator="kind")]
    rollout: Rollout
    algorithm: Algorithm = Algorithm()
    learner: Learner
    precision: Precision = Precision()
    sync: Sync = Sync()
    checkpoint: Checkpoint = Checkpoint()
    warm_start: WarmStart | None = None
    trainer: Trainer
    # where metrics go beside metrics.jsonl: docs/how-it-works.md
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(["tensorboard"])
    gates: list[Gate] = Field([])
    slurm: Slurm | None = None

    @property
    def servers(self) -> int:
        """Rollout servers that a run starts: none if it learns from recorded samples."""
        return 0 if self.rollout.replay else self.rollout.servers

    @model_validator(mode="after")
    def _nodes_hold_everything(self) -> "Recipe":
        if self.slurm is not None:
            servers = self.rollout.servers * self.rollout.tensor_parallel
            check_nodes(self.slurm, self.learner.ranks, servers)
        return self

    @model_validator(mode="after")
    def _servers_outlive_a_sync(self) -> "Recipe":
        if self.rollout.health_timeout_s < self.sync.timeout_s:
            raise ValueError(
                f"rollout.health_timeout_s={self.rollout.health_timeout_s:g} is below "
                f"sync.timeout_s={self.sync.timeout_s:g}: a server does not answer while it takes "
                "weights, and would be killed for it; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _slices_reach_all_weights(self) -> "Recipe":
        """SGLang 0.5.23 gives its weight loaders one model, in one stage, of one replica."""
        for key in self.rollout.sglang if self.sync.transport == "sliced" else ():
            if key.replace("-", "_") in _NOT_SLICED:
                raise ValueError(
                    f"rollout.sglang.{key}: such servers cannot take weights in slices; set "
                    "sync.transport: distributed"
                )
        return self

    @model_validator(mode="after")
    def _both_engines_have_one_head(self) -> "Recipe":
        head = self.precision.head
        for key, value in self.rollout.sglang.items():
            if key.replace("-", "_") == "enable_fp32_lm_head" and value is not (head == "fp32"):
                raise ValueError(
                    f"rollout.sglang.{key}={value!r}, but precision.head={head!r}: logits of one engine "
                    "alone would be rounded, which is most of the mismatch that fp32 logits would save; "
                    "remove the first, and set precision.head: fp32 for both engines or null for none"
                )
        if head and self.learner.megatron.get("defer_embedding_wgrad_compute"):
            raise ValueError(
                f"precision.head={head!r}: learner.megatron.defer_embedding_wgrad_compute leaves gradients of "
                "the output layer to Megatron's own product; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _samples_suit_the_algorithm(self) -> "Recipe":
        advantage, overlong = self.algorithm.advantage, self.algorithm.overlong
        compares = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
        if advantage in compares and self.rollout.samples < 2:
            raise ValueError(
                f"rollout.samples must be at least 2: {advantage} compares the samples of a prompt"
            )
        if overlong is not None and overlong.buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"algorithm.overlong.buffer={overlong.buffer} is more than "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _old_samples_have_their_own_policy(self) -> "Recipe":
        algorithm = self.algorithm
        if self.rollout.ahead and algorithm.old_policy != "rollout" and not algorithm.correction:
            raise ValueError(
                f"rollout.ahead={self.rollout.ahead}: samples are of older weights than the learner's, so "
                "the loss must know the policy that sampled; set algorithm.old_policy: rollout, or "
                "give algorithm.correction"
            )
        return self

    @model_validator(mode="after")
    def _function_samples_alone(self) -> "Recipe":
        name = self.rollout.function
        if name is None:
            return self
        if self.rollout.ahead > 1:
            raise ValueError(
                f"rollout.ahead={self.rollout.ahead}: responses of rollout.function={name} cannot be cut by an "
                "update and go on; set rollout.ahead: 1"
            )
        if isinstance(self.task, EnvironmentTask):
            raise ValueError(
                f"rollout.function={name}: an environment's samples are played by task.path="
                f"{self.task.path}; remove one of the two"
            )
        if self.trainer.suites:
            raise ValueError(
                f"trainer.suites: one request samples a suite's response, not rollout.function={name}; remove "
                "one of the two"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Recipe":
        ranks, prompts = self.learner.data_parallel, self.rollout.prompts
        sequences, batch = prompts * self.rollout.samples, self.learner.global_batch_size
        if prompts % ranks:
            raise ValueError(
                f"rollout.prompts={prompts} is not a multiple of the {ranks} data-parallel "
                f"ranks; nearest: {multiples(prompts, ranks)}"
            )
        if sequences % batch or batch % ranks:
            largest = min(sequences, 1_000_000)  # more is a slip, and would take long to search
            good = [n for n in range(ranks, largest + 1, ranks) if sequences % n == 0]
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

    def flat(self) -> dict[str, Any]:
        """Dotted keys and values, without `base`."""
        return notation.flat(self.model_dump(mode="json", exclude={"base"}))

    def shown(self) -> dict[str, Any]:
        """`flat`, without the values of slurm.environment, which may be secret."""
        return {k: HIDDEN if k.startswith(_SECRET) else value for k, value in self.flat().items()}

    def difference(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Dotted keys whose values differ, with both as `shown`; "(absent)" where a recipe has no such key."""
        one, two = self.flat(), other.flat()
        keys = [k for k in {**one, **two} if one.get(k, _ABSENT) != two.get(k, _ABSENT)]
        ours, theirs = self.shown(), other.shown()
        return {key: (ours.get(key, _ABSENT), theirs.get(key, _ABSENT)) for key in keys}

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `load` reads it back unchanged."""
        return notation.write(self.model_dump(mode="json", exclude={"base"}))
