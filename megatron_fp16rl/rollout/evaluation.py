"""Suites of problems: responses from servers, and a metric over them.

Problems are the sample of a metric: its interval is that of a mean over problems, so tries of one problem
do not count as independent.
"""

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.data.tasks import Task, make
from megatron_fp16rl.data.tasks.dataset import task_of
from megatron_fp16rl.recipe import (
    Recipe,
    RecipeError,
    Suite,
)
from megatron_fp16rl.rollout.client import Client, Generation, Sampling
from megatron_fp16rl.rollout.grading import grade
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.responses import Response
from megatron_fp16rl.rollout.turns import Turns, play
from megatron_fp16rl.utils.files import Unreadable, read_json_lines, write_json_lines

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]  # problem, try, prompt, answer, text, truncated, length, reward
CHUNK = 256  # responses of one request; an interrupted evaluation loses as many
_MAX_TOKENS = 1024  # of a response, where neither suite nor recipe says
_ALL = 10**9


@dataclass(frozen=True)
class Questions:
    """The problems of a suite as prompts, and how each is answered: by k responses."""

    suite: Suite
    task: Task
    prompts: list[Prompt]
    sampling: Sampling

    @classmethod
    def of(
        cls,
        suite: Suite,
        recipe: Recipe | None,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
    ) -> "Questions":
        """Reads the problems, the same at every call. Raises RecipeError if there are none.

        recipe: for what the suite leaves open.
        """
        task = make(task_of(suite, recipe), tokenizer, seed)
        most = suite.problems or _ALL
        is_held_out = suite.source == suite.HELD_OUT
        prompts = task.held_out_prompts(most) if is_held_out else task.all_training_prompts(most)
        if not prompts:
            raise RecipeError(f"--suite {suite.source}: the recipe's task holds no problems out")
        rollout = recipe.rollout if recipe else None
        sampling = Sampling(
            suite.max_new_tokens or (rollout.max_new_tokens if rollout else _MAX_TOKENS),
            0.0 if suite.greedy else suite.temperature,
            1.0 if suite.greedy else suite.top_p,
            tuple(rollout.stop) if rollout else (),
        )
        return cls(suite, task, prompts, sampling)

    @property
    def responses(self) -> int:
        return len(self.prompts) * self.suite.k

    def measure(self, pool: Pool, seed: int | None) -> dict[str, float]:
        """Evaluates the suite in training: {"eval/NAME/METRIC": value}. seed: as in `respond`."""
        # One chunk: the pool splits it over its servers itself.
        rows, stats = respond([pool], self, seed, chunk=self.responses)
        stats.check(self.task.max_error_fraction)
        return {self.suite.logged: measure(self.suite, rows)["value"]}


def respond(
    clients: Sequence[Client | Pool],
    questions: Questions,
    seed: int | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
    chunk: int = CHUNK,
) -> tuple[list[Row], GradingStats]:
    """Samples and grades all responses, in order; returns them and how grading went.

    seed: for servers that sample deterministically, else None. folder: keeps chunks of responses;
    what it holds is not sampled again. progress: called with the number of new responses. Raises
    ServerError.
    """
    pairs = [(i, j) for i in range(len(questions.prompts)) for j in range(questions.suite.k)]
    chunks = [pairs[start : start + chunk] for start in range(0, len(pairs), chunk)]

    def answer(number: int) -> tuple[list[Row], GradingStats]:
        file = None if folder is None else _file(folder, number)
        if file is not None and file.exists():
            try:
                rows, stats = read_json_lines(file), GradingStats()
            except Unreadable as error:
                raise Unreadable(
                    f"{error}; remove it, and its responses are sampled again"
                ) from None
        else:
            client = clients[number % len(clients)]
            rows, stats = _sample(client, questions, chunks[number], seed)
            if file is not None:
                write_json_lines(file, rows)
        progress(len(rows))
        return rows, stats

    with ThreadPoolExecutor(max(1, len(clients))) as threads:
        answers = list(threads.map(answer, range(len(chunks))))
    total = sum((stats for _, stats in answers), GradingStats())
    return [row for rows, _ in answers for row in rows], total


def is_complete(folder: Path, responses: int) -> bool:
    """Whether a folder holds `responses` responses."""
    return all(_file(folder, number).exists() for number in range(-(-responses // CHUNK)))


def _file(folder: Path, number: int) -> Path:
    return folder / f"responses_{number:05}.jsonl"


def _sample(
    client: Client | Pool,
    questions: Questions,
    pairs: Sequence[tuple[int, int]],
    seed: int | None,
) -> tuple[list[Row], GradingStats]:
    """Samples and grades the responses of (problem, try) pairs."""
    prompts = [questions.prompts[i] for i, _ in pairs]
    seeds = None
    if seed is not None:  # each response has its own, however they are split into chunks
        seeds = [random.Random(f"{seed}/{i}/{j}").getrandbits(62) for i, j in pairs]
    task, sampling = questions.task, questions.sampling
    responses: Sequence[Response | Generation]
    if task.environment is not None:
        responses, stats = play(
            Turns(task, sampling.max_new_tokens), client, prompts, sampling, seeds
        )
        texts, rewards = [r.text for r in responses], [r.reward or 0.0 for r in responses]
        lengths = [sum(r.mask) for r in responses]
    else:
        responses = client.generate([p.ids for p in prompts], sampling, seeds)
        texts, rewards, stats = grade(task, prompts, responses)
        lengths = [len(r.ids) for r in responses]
    rows = [
        {
            "problem": i,
            "try": j,
            "prompt": prompts[n].text,
            "answer": prompts[n].answer,
            "text": texts[n],
            "truncated": responses[n].truncated,
            "length": lengths[n],
            "reward": rewards[n],
        }
        for n, (i, j) in enumerate(pairs)
    ]
    return rows, stats


def measure(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """A suite's metric over responses, as `fp16rl eval --json` shows it.

    avg@k is the mean reward of the first k tries; pass@k uses all that there are.
    """
    rewards = rewards_of(rows)
    values = passes(rewards, suite.k) if suite.metric == "pass" else rewards[:, : suite.k].mean(1)
    value, low, high = mean_with_interval(values)
    return {
        "suite": suite.name,
        "metric": suite.label,
        "k": suite.k,
        "value": value,
        "low": low,
        "high": high,
        "problems": len(rewards),
        "responses": len(rows),
        "truncated_fraction": float(np.mean([row["truncated"] for row in rows])),
        "length_mean": float(np.mean([row["length"] for row in rows])),
    }


def rewards_of(rows: Sequence[Row]) -> np.ndarray:
    """[problems, tries] of rows in order."""
    problems = 1 + max(row["problem"] for row in rows)
    return np.array([row["reward"] for row in rows]).reshape(problems, -1)


def passes(rewards: np.ndarray, k: int) -> np.ndarray:
    """pass@k of rewards [problems, n], n >= k: the chance that one of k tries is right.

    A try is right if its reward is 1. Unbiased: 1 - C(n - c, k) / C(n, k) with c right of n (Chen et
    al., arXiv 2107.03374, equation 1).
    """
    n = rewards.shape[1]
    right = (rewards >= 1).sum(1)
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right])


def mean_with_interval(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """The mean of [problems] values, and plus or minus 1.96 standard errors, within [0, 1].

    Where rewards go beyond that, within these. There is no interval from a single problem.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    error = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    lowest, highest = min(0.0, float(values.min())), max(1.0, float(values.max()))
    return mean, max(lowest, mean - error), min(highest, mean + error)
