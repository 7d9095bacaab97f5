"""Responses to suites from real servers, kept as they come; and what they are worth."""

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.rewards import Tally
from megatron_fp16rl.data.tasks import Task, templates
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.evaluation import estimators
from megatron_fp16rl.rollout.evaluation.suites import Suite
from megatron_fp16rl.utils.files import (
    Unreadable,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)

_CHUNK = 256  # responses asked for at once of a server, and lost at most when it is stopped

Row = dict[str, object]  # problem, try, text, truncated, length, reward


@dataclass(frozen=True)
class Asked:
    """What a folder of responses belongs to: responses to anything else are not taken for these."""

    model: str
    weights: str
    source: str
    tries: int
    dtype: str
    sampling: Sampling
    seed: int
    prompts: str


def claim(folder: Path, asked: Asked) -> None:
    """Takes a folder for these responses. Raises RecipeError if it holds others."""
    file, values = folder / "asked.json", json.loads(json.dumps(asdict(asked)))
    if file.exists():
        found = read_json(file)
        for key, value in values.items():
            if found.get(key) != value:
                raise RecipeError(
                    f"{folder} holds responses with {key} = {found.get(key)}, not {value}; give "
                    "another --out, or remove that folder"
                )
    write_json(file, values)


def respond(
    clients: Sequence[Client],
    task: Task,
    prompts: Sequence[Prompt],
    tries: int,
    sampling: Sampling,
    seed: int | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
    at_once: int | None = None,
) -> tuple[list[Row], Tally]:
    """`tries` graded responses to each prompt, in order, and how grading went.

    seed: given to servers that sample deterministically, else None. folder: where chunks of responses
    are kept and looked for; if it has all, no client is needed. progress: called with how many more
    responses there are. at_once: responses in a chunk, which one client is asked for; default: 256. Raises
    ServerError.
    """
    at_once = at_once or _CHUNK
    asked = [(i, attempt) for i in range(len(prompts)) for attempt in range(tries)]
    chunks = [asked[start : start + at_once] for start in range(0, len(asked), at_once)]

    def answer(number: int) -> tuple[list[Row], Tally]:
        file = None if folder is None else _file(folder, number)
        if file is not None and file.exists():
            done = _kept(file), Tally()
        else:
            done = _ask(
                clients[number % len(clients)], task, prompts, chunks[number], sampling, seed
            )
            if file is not None:
                write_text(file, "".join(json.dumps(row) + "\n" for row in done[0]))
        progress(len(done[0]))
        return done

    with ThreadPoolExecutor(max(1, len(clients))) as threads:
        found = list(threads.map(answer, range(len(chunks))))
    return [row for rows, _ in found for row in rows], sum((t for _, t in found), Tally())


def _kept(file: Path) -> list[Row]:
    try:
        return read_json_lines(file)
    except Unreadable as error:
        raise Unreadable(f"{error}; remove it, and its responses are asked for again") from None


def is_complete(folder: Path, responses: int) -> bool:
    """Whether a folder holds so many responses."""
    return all(_file(folder, number).exists() for number in range(-(-responses // _CHUNK)))


def _file(folder: Path, number: int) -> Path:
    return folder / f"responses_{number:05}.jsonl"


def _ask(
    client: Client,
    task: Task,
    prompts: Sequence[Prompt],
    asked: Sequence[tuple[int, int]],
    sampling: Sampling,
    seed: int | None,
) -> tuple[list[Row], Tally]:
    seeds = None
    if seed is not None:
        seeds = [random.Random(f"{seed}/{i}/{attempt}").getrandbits(62) for i, attempt in asked]
    answers = client.generate([prompts[i].ids for i, _ in asked], sampling, seeds)
    # As in training: a truncated answer is no answer.
    whole = [n for n, answer in enumerate(answers) if not answer.truncated]
    texts = [
        templates.decode(prompts[i].ids, answer.ids, task.tokenizer)
        for (i, _), answer in zip(asked, answers, strict=True)
    ]
    grades = task.grades([prompts[asked[n][0]] for n in whole], [texts[n] for n in whole])
    rewards = {n: grade.reward for n, grade in zip(whole, grades, strict=True)}
    rows = [
        {
            "problem": i,
            "try": attempt,
            "prompt": prompts[i].text,
            "answer": prompts[i].answer,
            "text": texts[n],
            "truncated": answer.truncated,
            "length": len(answer.ids),
            "reward": rewards.get(n, 0.0),
        }
        for n, ((i, attempt), answer) in enumerate(zip(asked, answers, strict=True))
    ]
    return rows, Tally.of(grades)


def measure(suite: Suite, rows: Sequence[Row]) -> dict[str, object]:
    """A suite's metric over responses, as `fp16rl eval --json` shows it.

    avg@k is of the first k tries; pass@k and maj@k use all that there are.
    """
    rewards = _table(rows, "reward")
    if suite.metric in ("avg", "greedy"):
        values = estimators.average(rewards[:, : suite.k])
    elif suite.metric == "pass":
        values = estimators.passes(rewards, suite.k)
    else:
        answers = [[estimators.final_answer(t) for t in texts] for texts in _table(rows, "text")]
        values = estimators.majority(rewards, answers, suite.k)
    return {
        "suite": suite.name,
        "metric": suite.label,
        "k": suite.k,
        **asdict(estimators.estimate(values)),
        "problems": len(rewards),
        "responses": len(rows),
        "truncated_fraction": float(np.mean([row["truncated"] for row in rows])),
        "length_mean": float(np.mean([row["length"] for row in rows])),
    }


def perfectible(
    rows: Sequence[Row], problems: Sequence[tuple[str, str]], low: float, high: float
) -> list[Row]:
    """The problems that are solved in a share of the tries within [low, high], with that share.

    problems: (problem, answer) of the prompts that were asked. They are what the paper's sanity test
    trains on (arXiv 2510.26788, section 4): neither hopeless nor solved already.
    """
    solved = (_table(rows, "reward") >= 1).mean(1)
    return [
        {"problem": problem, "answer": answer, "solved": float(share)}
        for (problem, answer), share in zip(problems, solved, strict=True)
        if low <= share <= high
    ]


def _table(rows: Sequence[Row], key: str) -> np.ndarray:
    """[problems, tries] of rows in order."""
    problems = 1 + max(row["problem"] for row in rows)
    return np.array([row[key] for row in rows]).reshape(problems, -1)


def shared(suites: Sequence[Suite]) -> dict[tuple[str, bool], int]:
    """Tries needed of each source, greedy or not: suites on the same problems share responses."""
    tries: dict[tuple[str, bool], int] = {}
    for suite in suites:
        key = (suite.source, suite.greedy)
        tries[key] = max(tries.get(key, 0), suite.k)
    return tries


def greedy(sampling: Sampling) -> Sampling:
    """The same, with the likeliest token each time."""
    return replace(sampling, temperature=0.0, top_p=1.0)
