"""Of a run: what precedes it, how long it is, what it saves and evaluates, and what it must reach."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from megatron_fp16rl.recipe.learner import Optimizer
from megatron_fp16rl.recipe.values import (
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    Place,
    PositiveInt,
    Seconds,
    Section,
    Share,
)


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

    @model_validator(mode="after")
    def _looks_at_the_accuracy(self) -> "WarmStart":
        if self.check_every > self.max_updates:
            raise ValueError(
                f"check_every={self.check_every} is above max_updates={self.max_updates}: nobody would look "
                "whether the accuracy is reached; lower the first or raise the second"
            )
        return self


class Suite(Section):
    """Problems that are evaluated in training, on the rollout servers."""

    # Sources that are no files: the problems of a recipe's own task.
    HELD_OUT: ClassVar = "held-out"
    TRAINING: ClassVar = "training"

    suite: Place  # FILE:METRIC as for fp16rl eval, e.g. aime.jsonl:avg@4
    temperature: NonNegativeFloat = 1.0
    top_p: Share = 1.0
    max_new_tokens: PositiveInt | None = None  # null: the rollouts'
    problems: PositiveInt | None = None  # at most so many

    @field_validator("suite")
    @classmethod
    def _check_suite(cls, text: str) -> str:
        if not re.fullmatch(r".+:((avg|pass)@[1-9][0-9]{0,5}|greedy)", text):
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
    def logged(self) -> str:
        """Its metric in metrics.jsonl."""
        return f"eval/{self.name}/{self.label}"

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
    run_root: Place = Field("runs", min_length=1)
    max_restarts: NonNegativeInt = 3  # of ranks that died or hung, since the last checkpoint
    # a longer step is a hang; null: no limit. Waiting for servers does not count
    step_timeout_s: Seconds | None = 3600

    @field_validator("suites")
    @classmethod
    def _are_told_apart(cls, suites: list[Suite]) -> list[Suite]:
        logged = [suite.logged for suite in suites]
        for name in logged:
            if logged.count(name) > 1:
                raise ValueError(f"two are logged as {name}: remove one, or rename its file")
        return suites


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
        if self.above is not None and self.below is not None and self.above < self.below:
            raise ValueError(
                f"above={self.above:g} and below={self.below:g}: a gate breaks above the one and below the "
                "other, so every value would; swap them, or give two gates"
            )
        return self


Origin = Annotated[str, Field(pattern=r"^(paper|public run|planner|ours|untested|run here)\b")]


class Provenance(Section):
    """Where numbers come from: paper, public run, planner, ours, untested or run here; then which."""

    algorithm: Origin  # algorithm, batch sizes, lengths, learning rate
    layout: Origin  # nodes, parallelism, recomputation, micro-batches
    run: Origin = "untested"  # run here: only of what was run here
