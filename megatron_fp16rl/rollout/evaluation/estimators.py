"""What several tries at each of several problems say about a model.

Every estimator gives one value a problem, [problems], of which the mean is reported. Problems are the
sample: the interval is that of their mean, so tries of one problem do not count as independent.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % interval; no interval from a single problem."""

    value: float
    low: float | None
    high: float | None


def estimate(values: np.ndarray) -> Estimate:
    """The mean of [problems] values, plus or minus 1.96 standard errors, within [0, 1]."""
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, None, None)
    error = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, max(0.0, mean - error), min(1.0, mean + error))


def average(rewards: np.ndarray) -> np.ndarray:
    """avg@k of rewards [problems, k]: the mean reward of each problem."""
    return rewards.mean(1)


def passes(rewards: np.ndarray, k: int) -> np.ndarray:
    """pass@k of rewards [problems, n], n >= k: the chance that one of k tries is right.

    A try is right if its reward is 1. Unbiased: 1 - C(n - c, k) / C(n, k) with c right of n (Chen et
    al., arXiv 2107.03374, equation 1).
    """
    n = rewards.shape[1]
    right = (rewards >= 1).sum(1)
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right])


def majority(rewards: np.ndarray, answers: Sequence[Sequence[str]], k: int) -> np.ndarray:
    """maj@k of rewards [problems, n] and answers [problems][n]: is the commonest of k answers right?

    The tries are taken k at a time, in their order, and what is left over is left out; a tie counts
    as often as a fair draw among the commonest would be right. Right answers are all the same,
    however they are written (Wang et al., arXiv 2203.11171).
    """
    problems, n = rewards.shape
    found = np.zeros(problems)
    for i in range(problems):
        groups = [range(start, start + k) for start in range(0, n - k + 1, k)]
        votes = [_vote([(rewards[i, j] >= 1, answers[i][j]) for j in group]) for group in groups]
        found[i] = sum(votes) / len(votes)
    return found


def _vote(tries: Sequence[tuple[bool, str]]) -> float:
    counts = Counter((right, None if right else answer) for right, answer in tries)
    most = max(counts.values())
    commonest = [right for (right, _), count in counts.items() if count == most]
    return sum(commonest) / len(commonest)


def final_answer(text: str) -> str:
    """The answer that a response gives, for comparing wrong ones with one another.

    What is in the last \\boxed{}, else the last number, else the whole text; without white space.
    """
    start = text.rfind("\\boxed{")
    if start >= 0:
        inside = _to_closing_brace(text[start + len("\\boxed{") :])
        if inside is not None:
            return "".join(inside.split())
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else "".join(text.split())


def _to_closing_brace(text: str) -> str | None:
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return None
