"""Tasks: prompts to train on, prompts held out, and what an answer is worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_fp16rl import rewards
from megatron_fp16rl.recipe import (
    AdditionTask,
    DatasetTask,
    FunctionReward,
    ReasoningGymTask,
    RecipeError,
)

if TYPE_CHECKING:  # to check a recipe takes no torch
    from megatron_fp16rl.batch import Prompt

Settings = AdditionTask | DatasetTask | ReasoningGymTask


class Task(Protocol):
    """What the loop needs of a task. Prompts depend on the recipe and the step alone."""

    description: str  # how many problems there are
    tokenizer: object
    max_error_fraction: float  # of graded responses; more errors stop the run

    def training_prompts(self, step: int, count: int) -> "list[Prompt]":
        """The prompts of a step."""

    def held_out_prompts(self, count: int) -> "list[Prompt]":
        """At most `count` prompts that are never trained on, always the same."""

    def all_training_prompts(self, count: int) -> "list[Prompt]":
        """At most `count` prompts that are trained on, each once, always the same."""

    def as_problem(self, prompt: "Prompt") -> tuple[str, str]:
        """The (problem, answer) that a prompt asks, as a file that this task reads has it."""

    def grades(self, prompts: "Sequence[Prompt]", responses: Sequence[str]) -> list[rewards.Grade]:
        """What each response is worth. Responses have no special tokens."""


def make(settings: Settings, tokenizer: object, seed: int) -> Task:
    """The task of a recipe. seed: the run's; the split of a data set has a seed of its own."""
    from megatron_fp16rl.tasks import dataset, gym
    from megatron_fp16rl.tasks.addition import Addition
    from megatron_fp16rl.tasks.problems import ProblemTask

    match settings:
        case AdditionTask():
            return Addition(settings, tokenizer, seed)
        case DatasetTask():
            grade = rewards.make(settings.reward)
            return ProblemTask(settings, dataset.load(settings), grade, tokenizer, seed)
        case ReasoningGymTask():
            return ProblemTask(
                settings, gym.load(settings), gym.verifier(settings), tokenizer, seed
            )


def check(settings: Settings) -> tuple[int, str | None]:
    """Raises RecipeError if a task's data or its reward is not to be had. Downloads what is missing.

    Returns how many problems it holds out, long ones among them, and one to train on where they are read.
    """
    from megatron_fp16rl.tasks import dataset, gym
    from megatron_fp16rl.tasks.split import split

    if isinstance(settings, AdditionTask):
        if settings.problems is not None:
            dataset.read_sums(Path(settings.problems))
        return 1, None  # at least
    if isinstance(settings, ReasoningGymTask):
        gym.generator(settings)
        return round(settings.size * settings.held_out), None
    problems = dataset.load(settings)
    parts = split(problems, settings.held_out, settings.seed)
    with rewards.grader(settings.reward) as grade:
        if isinstance(settings.reward, FunctionReward):
            try:
                grade.check()
            except rewards.RewardError as error:
                raise RecipeError(f"task.reward.path={settings.reward.path}: {error}") from None
    return len(parts.held_out), problems[parts.training[0]][0] if parts.training else None
