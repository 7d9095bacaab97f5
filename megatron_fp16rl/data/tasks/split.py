"""Splits problems into training and held-out ones, and drops repeats and contradictions."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fp16rl.recipe import EnvironmentTask, Problems


@dataclass(frozen=True)
class Split:
    """Indices into a list of problems.

    repeats   problems that were there already, with the same answer
    at_odds   problems with several answers, which are left out
    """

    training: list[int]
    held_out: list[int]
    repeats: int
    at_odds: list[str]


def parts_of(settings: Problems, problems: Sequence[tuple[str, str]]) -> Split:
    """The split that a task asks for.

    An environment may have many answers to one problem, its secrets: there each pair counts as a problem.
    """
    if isinstance(settings, EnvironmentTask):
        problems = [(json.dumps(pair), "") for pair in problems]
    return split(problems, settings.held_out, settings.seed)


def split(problems: Sequence[tuple[str, str]], held_out: float, seed: int) -> Split:
    """Each (problem, answer) once: no problem may be both held out and trained on.

    held_out: share of them, rounded to whole problems; there may be none.
    """
    first: dict[str, int] = {}
    at_odds: set[str] = set()
    for index, (problem, answer) in enumerate(problems):
        known = first.setdefault(problem, index)
        if problems[known][1] != answer:
            at_odds.add(problem)
    order = [index for problem, index in first.items() if problem not in at_odds]
    repeats = sum(problem not in at_odds for problem, _ in problems) - len(order)
    random.Random(seed).shuffle(order)
    count = round(len(order) * held_out)
    return Split(order[count:], order[:count], repeats, sorted(at_odds, key=first.__getitem__))
