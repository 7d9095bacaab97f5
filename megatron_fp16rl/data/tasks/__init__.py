"""Tasks: training prompts, held-out prompts, and the grading of responses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_fp16rl.data import rewards
from megatron_fp16rl.recipe import (
    AdditionTask,
    DatasetTask,
    EnvironmentTask,
    FunctionReward,
    RecipeError,
)

if TYPE_CHECKING:  # to check a recipe takes no torch
    from transformers import PreTrainedTokenizerBase

    from megatron_fp16rl.data.batch import Prompt
    from megatron_fp16rl.data.environments import Environments

Settings = AdditionTask | DatasetTask | EnvironmentTask


class Task(Protocol):
    """What the loop needs of a task. Prompts depend on recipe and step alone."""

    description: str  # a line for the log: how many problems
    tokenizer: "PreTrainedTokenizerBase"
    max_error_fraction: float  # of graded responses; more errors stop the run

    @property
    def environment(self) -> "Environments | None":
        """What plays a prompt's samples over several turns; None: a response is one turn."""

    def training_prompts(self, step: int, count: int) -> "list[Prompt]":
        """The prompts of a step."""

    def held_out_prompts(self, count: int) -> "list[Prompt]":
        """At most `count` prompts that are never trained on, always the same."""

    def all_training_prompts(self, count: int) -> "list[Prompt]":
        """At most `count` prompts that are trained on, each once, always the same."""

    def as_problem(self, prompt: "Prompt") -> tuple[str, str]:
        """The (problem, answer) of a prompt, as a file that this task reads would have it."""

    def grades(self, prompts: "Sequence[Prompt]", responses: Sequence[str]) -> list[rewards.Grade]:
        """The grade of each response. Responses have no special tokens."""


def make(settings: Settings, tokenizer: "PreTrainedTokenizerBase", seed: int) -> Task:
    """The task of a recipe. seed: of the run; the split of a data set has its own."""
    from megatron_fp16rl.data.tasks import dataset
    from megatron_fp16rl.data.tasks.addition import Addition
    from megatron_fp16rl.data.tasks.environment import EnvironmentProblems
    from megatron_fp16rl.data.tasks.problems import ProblemTask

    match settings:
        case AdditionTask():
            return Addition(settings, tokenizer, seed)
        case DatasetTask():
            grade, most = rewards.make_grader(settings.reward), settings.reward.max_error_fraction
            return ProblemTask(settings, dataset.load(settings), grade, most, tokenizer, seed)
        case EnvironmentTask():
            return EnvironmentProblems(settings, dataset.load(settings), tokenizer, seed)


@dataclass(frozen=True)
class Checked:
    """A task that was checked.

    held_out   number of held-out problems, including those that are too long
    problems   training problems, as far as they are read
    """

    held_out: int
    problems: list[str] = field(default_factory=list)


def is_here(settings: Settings) -> bool:
    """Whether a task's problems can be read without a network and without other libraries."""
    if isinstance(settings, DatasetTask):
        return settings.path is not None and Path(settings.path).exists()
    return settings.problems is None or Path(settings.problems).exists()


def check(settings: Settings, partial: bool = False) -> Checked:
    """Raises RecipeError if a task's data or reward cannot be used. Downloads what is missing.

    partial: checks the data alone: grading may need another machine.
    """
    from megatron_fp16rl.data.environments import Environments
    from megatron_fp16rl.data.tasks import dataset
    from megatron_fp16rl.data.tasks.split import parts_of

    if isinstance(settings, AdditionTask):
        if settings.problems is not None:
            dataset.read_sums(Path(settings.problems))
        return Checked(1)  # at least
    problems = dataset.load(settings)
    parts = parts_of(settings, problems)
    if not partial and isinstance(settings, EnvironmentTask):
        Environments.check(settings)
    elif not partial and isinstance(settings, DatasetTask):
        reward = settings.reward
        with rewards.open_grader(reward) as grade:
            if isinstance(reward, FunctionReward):
                try:
                    grade.check()
                except rewards.RewardError as error:
                    raise RecipeError(f"task.reward.path={reward.path}: {error}") from None
    return Checked(len(parts.held_out), [problems[index][0] for index in parts.training])
