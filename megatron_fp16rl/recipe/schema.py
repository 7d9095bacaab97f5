"""The sections of a recipe in the order of a file, then the recipe and what its sections must agree about.

The comment at a key is its description in docs/recipe-keys.md. The larger sections are in tasks.py, rollout.py,
algorithm.py, learner.py, run.py and slurm.py.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_fp16rl.recipe import notation
from megatron_fp16rl.recipe.algorithm import Algorithm
from megatron_fp16rl.recipe.learner import Learner, Precision
from megatron_fp16rl.recipe.rollout import NOT_SLICED, Rollout, Sync
from megatron_fp16rl.recipe.run import Checkpoint, Gate, Provenance, Trainer, WarmStart
from megatron_fp16rl.recipe.slurm import Slurm, check_nodes
from megatron_fp16rl.recipe.tasks import EnvironmentTask, Task
from megatron_fp16rl.recipe.values import (
    HIDDEN,
    Int,
    Options,
    Place,
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
    path: Place | None = None  # Hugging Face folder, or name in the local cache
    shape: Place | None = None  # config.json to plan with where path is not
    build: BuildModel | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> "Model":
        if (self.path is None) == (self.build is None):
            raise ValueError("give either path or build")
        if self.shape is not None and self.path is None:
            raise ValueError("shape goes with path, not with build")
        return self


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

    @property
    def server_gpus(self) -> int:
        return self.rollout.servers * self.rollout.tensor_parallel

    @model_validator(mode="after")
    def _nodes_hold_everything(self) -> "Recipe":
        if self.slurm is not None:
            check_nodes(self.slurm, self.learner.ranks, self.server_gpus)
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
            if key in NOT_SLICED:
                raise ValueError(
                    f"rollout.sglang.{key}: such servers cannot take weights in slices; set "
                    "sync.transport: distributed"
                )
        return self

    @model_validator(mode="after")
    def _both_engines_have_one_head(self) -> "Recipe":
        head = self.precision.head
        served = self.rollout.sglang.get("enable_fp32_lm_head")
        if served is not None and served is not (head == "fp32"):
            raise ValueError(
                f"rollout.sglang.enable_fp32_lm_head={served!r}, but precision.head={head!r}: logits of one "
                "engine alone would be rounded, which is most of the mismatch that fp32 logits would save; "
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
        if self.rollout.refill_rounds and self.rollout.samples < 2:
            raise ValueError(
                f"rollout.refill_rounds={self.rollout.refill_rounds} replaces prompts whose samples all earn the "
                f"same, as every one does with rollout.samples={self.rollout.samples}; remove it"
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
    def _warm_start_divides(self) -> "Recipe":
        unit = self.learner.data_parallel * self.learner.sequences_multiple
        if self.warm_start is not None and (batch := self.warm_start.global_batch_size) % unit:
            raise ValueError(
                f"warm_start.global_batch_size={batch} is not a multiple of {unit}, the data-parallel ranks (x "
                f"pipeline_parallel with model_chunks > 1); nearest: {multiples(batch, unit)}"
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
