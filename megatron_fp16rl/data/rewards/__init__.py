"""What responses are worth: graded by rules, a user's function, or a service.

Whatever could hang or die does so in a worker process and costs one response its reward; whatever
fails is an error, counted and shown, and too many of them stop the run. No torch here: workers
import this package.

    with grader(MathVerifyReward(kind="math_verify")) as grade:
        grades = grade([Row("What is 1 + 1?", "It is \\\\boxed{2}.", "2")])
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

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
    index: int = -1  # of the problem in its data


@dataclass(frozen=True)
class Grade:
    """What a response is worth; 0 if its grading took too long (timed_out), or failed or ended the worker."""

    reward: float
    timed_out: bool = False
    error: str | None = None


Grader = Callable[[Sequence[Row]], list[Grade]]


@contextmanager
def grader(settings: "Reward") -> Iterator[Grader]:
    """The grader of a recipe's `task.reward`; its workers are gone after the block."""
    made = make(settings)
    try:
        yield made
    finally:
        close = getattr(made, "close", None)
        if close is not None:
            close()


def make(settings: "Reward") -> Grader:
    """As `grader`, for as long as this process lives. Nothing is started before the first rows.

    Raises RecipeError if a variable that the recipe names is not in the environment.
    """
    from megatron_fp16rl import recipe
    from megatron_fp16rl.data.rewards import functions
    from megatron_fp16rl.data.rewards.service import Service
    from megatron_fp16rl.data.rewards.workers import Pool

    match settings:
        case recipe.ExactReward():
            return exact
        case recipe.HttpReward():
            return Service(settings)
        case recipe.MathVerifyReward():
            return Pool(settings, functions.math_verify)
        case recipe.RegexReward():
            return Pool(settings, functions.regex, settings.pattern)
        case recipe.FunctionReward():
            return Pool(settings, functions.users, settings.path)
    raise TypeError(f"{type(settings).__name__} is no reward")


def exact(rows: Sequence[Row]) -> list[Grade]:
    """1 for exactly the answer, white space around it apart."""
    return [Grade(float(row.response.strip() == row.answer.strip())) for row in rows]


def as_reward(value: object) -> float:
    """A reward that somebody else made. Raises ValueError unless it is a finite number."""
    with contextlib.suppress(OverflowError):  # an integer of a thousand digits
        if isinstance(value, Real) and math.isfinite(number := float(value)):
            return number
    raise ValueError(f"a reward must be a finite number, not {str(value)[:100]!r}")


@dataclass(frozen=True)
class Tally:
    """How the grading of some responses went."""

    graded: int = 0
    timeouts: int = 0
    errors: int = 0
    first_error: str | None = None

    @classmethod
    def of(cls, grades: Sequence[Grade]) -> "Tally":
        """Counts."""
        errors = [grade.error for grade in grades if grade.error is not None]
        timeouts = sum(grade.timed_out for grade in grades)
        return cls(len(grades), timeouts, len(errors), errors[0] if errors else None)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.graded + other.graded,
            self.timeouts + other.timeouts,
            self.errors + other.errors,
            other.first_error if self.first_error is None else self.first_error,
        )

    def check(self, max_error_fraction: float) -> None:
        """Raises RewardError if there are more errors than that, the first one in its message.

        Of the responses that were graded: where most are truncated, the others still must not all
        fail unnoticed.
        """
        if self.errors > max_error_fraction * self.graded:
            raise RewardError(
                f"{self.errors} of {self.graded} responses could not be graded "
                f"(task.reward.max_error_fraction={max_error_fraction:g}). "
                f"The first error: {self.first_error}"
            )
