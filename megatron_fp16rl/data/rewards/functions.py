"""What runs in worker processes. Each of these prepares one, and returns what grades a row there."""

import functools
import logging
import re
from collections.abc import Callable

from megatron_fp16rl.data.rewards import Row, as_reward
from megatron_fp16rl.utils.user_code import load_function

Function = Callable[[Row], float]


def math_verify() -> Function:
    """1 if math-verify finds the response's answer equal to the problem's, else 0.

    Without math-verify's own time limits, which are alarms in whole seconds, of one step of many
    each, and cannot interrupt a long product: workers have theirs.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of its missing limits

    @functools.lru_cache(maxsize=256)
    def gold(answer: str) -> list:
        parsed = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        if not parsed:
            raise ValueError(f"math-verify cannot read the problem's answer {answer!r}")
        return parsed

    def grade(row: Row) -> float:
        right = gold(row.answer)
        given = parse(row.response, parsing_timeout=None)
        return float(verify(right, given, timeout_seconds=None))

    return grade


def regex(pattern: str) -> Function:
    """1 if the last match, or its first group if there is one, is the answer, else 0."""
    compiled = re.compile(pattern)
    wanted = min(1, compiled.groups)

    def grade(row: Row) -> float:
        found = None
        for match in compiled.finditer(row.response):
            found = match[wanted]
        return float(found is not None and found.strip() == row.answer.strip())

    return grade


def users(path: str) -> Function:
    """A user's function of prompt, response and answer. path: file:function.

    Raises ValueError if there is no such file or function.
    """
    function = load_function(path)
    return lambda row: as_reward(function(row.prompt, row.response, row.answer))


def reasoning_gym(name: str, options: dict[str, object]) -> Function:
    """The verifier of a generator, on what stands between the last <answer> and </answer>."""
    import reasoning_gym
    from reasoning_gym.utils import extract_answer

    data = reasoning_gym.create_dataset(name, **options)
    entry = functools.lru_cache(maxsize=256)(data.__getitem__)

    def grade(row: Row) -> float:
        return as_reward(data.score_answer(extract_answer(row.response), entry(row.index)))

    return grade
