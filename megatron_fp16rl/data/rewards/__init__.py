"""Rewards of responses: by rules, or a user's function.

Code that could hang or die runs in worker processes, where that costs one response its reward. Failures
are counted and logged; too many of them stop the run. No torch here: workers import this package.

    with open_grader(MathVerifyReward(kind="math_verify")) as grade:
        grades = grade([Row("What is 1 + 1?", "It is \\\\boxed{2}.", "2")])
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_fp16rl.utils.errors import FinalError

if TYPE_CHECKING:
    from megatron_fp16rl.recipe import Reward


class RewardError(FinalError):
    """Responses cannot be graded. The message says why."""


class Row(NamedTuple):
    """A response to be graded."""

    prompt: str
    response: str
    answer: str
    problem_index: int = -1  # in its data set


@dataclass(frozen=True)
class Grade:
    """The reward of a response: 0 if grading took too long (timed_out), failed, or ended the worker (error)."""

    reward: float
    timed_out: bool = False
    error: str | None = None


class Grader(ABC):
    """Grades the responses of a step, all at once."""

    @abstractmethod
    def __call__(self, rows: Sequence[Row]) -> list[Grade]:
        """The grade of each row. Raises RewardError if nothing can be graded at all."""

    def check(self) -> None:  # noqa: B027
        """Raises RewardError if it could not grade. Starts what it needs."""

    def close(self) -> None:  # noqa: B027
        """Ends what it started."""


class ExactGrader(Grader):
    """1 for exactly the answer, white space around it apart."""

    def __call__(self, rows: Sequence[Row]) -> list[Grade]:
        return [Grade(float(row.response.strip() == row.answer.strip())) for row in rows]


@contextmanager
def open_grader(settings: "Reward") -> Iterator[Grader]:
    """The grader of a recipe's `task.reward`; its workers are gone after the block."""
    grader = make_grader(settings)
    try:
        yield grader
    finally:
        grader.close()


def make_grader(settings: "Reward") -> Grader:
    """As `open_grader`, for as long as this process lives. Starts nothing before the first rows."""
    from megatron_fp16rl import recipe
    from megatron_fp16rl.data.rewards import functions
    from megatron_fp16rl.data.rewards.workers import WorkerPool

    match settings:
        case recipe.ExactReward():
            return ExactGrader()
        case recipe.MathVerifyReward():
            return WorkerPool(settings, functions.math_verify)
        case recipe.FunctionReward():
            return WorkerPool(settings, functions.user_function, settings.path)
    raise TypeError(f"{type(settings).__name__} is no reward")


def as_reward(value: Any) -> float:
    """The reward that foreign code returned. Raises ValueError unless it is a finite number."""
    with contextlib.suppress(OverflowError):  # an integer of a thousand digits
        if isinstance(value, Real) and math.isfinite(number := float(value)):
            return number
    raise ValueError(f"a reward must be a finite number, not {str(value)[:100]!r}")


@dataclass(frozen=True)
class GradingStats:
    """Counts of graded responses, and of those that could not be graded."""

    graded: int = 0
    timeouts: int = 0
    errors: int = 0
    first_error: str | None = None

    @classmethod
    def of(cls, grades: Sequence[Grade]) -> "GradingStats":
        errors = [grade.error for grade in grades if grade.error is not None]
        timeouts = sum(grade.timed_out for grade in grades)
        return cls(len(grades), timeouts, len(errors), errors[0] if errors else None)

    def __add__(self, other: "GradingStats") -> "GradingStats":
        return GradingStats(
            self.graded + other.graded,
            self.timeouts + other.timeouts,
            self.errors + other.errors,
            other.first_error if self.first_error is None else self.first_error,
        )

    def check(self, max_error_fraction: float) -> None:
        """Raises RewardError if more than that share of the graded responses failed.

        Truncated responses are not graded and do not count: where most are truncated, all others failing
        must not pass unnoticed.
        """
        if self.errors > max_error_fraction * self.graded:
            raise RewardError(
                f"{self.errors} of {self.graded} responses could not be graded "
                f"(max_error_fraction={max_error_fraction:g} of the task). "
                f"The first error: {self.first_error}"
            )
