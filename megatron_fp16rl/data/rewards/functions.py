"""Grading functions that run in worker processes. Each is called once in a worker, and returns its function."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from megatron_fp16rl.data.rewards import Row, as_reward
from megatron_fp16rl.utils.user_code import load_function

RewardFunction = Callable[..., float]  # of the fields of a Row


def math_verify() -> RewardFunction:
    """1 if math-verify finds the response's answer equal to the problem's, else 0.

    math-verify's own time limits are off: they are alarms of whole seconds for single steps, and cannot
    interrupt a long product. The worker pool has a limit of its own.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of its missing limits

    @functools.lru_cache(maxsize=256)
    def parsed_answer(answer: str) -> list[Any]:
        parsed = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        if not parsed:
            raise ValueError(f"math-verify cannot read the problem's answer {answer!r}")
        return parsed

    def grade(*fields: Any) -> float:
        row = Row(*fields)
        right = parsed_answer(row.answer)
        answer = parse(row.response, parsing_timeout=None)
        return float(verify(right, answer, timeout_seconds=None))

    return grade


def user_function(path: str) -> RewardFunction:
    """A user's function of prompt, response and answer. path: file:function.

    Raises ValueError if there is no such file or function.
    """
    function = load_function(path, "prompt", "response", "answer")
    return lambda prompt, response, answer, *_: as_reward(function(prompt, response, answer))
