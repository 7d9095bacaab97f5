"""What runs in worker processes. Each of these prepares one, and returns what grades a row there."""

import functools
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_fp16rl.data.rewards import Row, as_reward

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
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    sys.path.insert(0, str(Path(file).resolve().parent))  # as for a script: its neighbours
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"{file} has no function {name!r}; it has: {', '.join(known) or 'none'}")
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
