"""`fp16rl eval`: from a model and suites to a table."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_fp16rl.models.check import check_served_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import Dtype, Recipe, RecipeError, Suite, load
from megatron_fp16rl.rollout import evaluation
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.evaluation import Questions
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.tools.settings_file import check_settings, digest, weights_digest
from megatron_fp16rl.utils.files import write_json, write_json_lines
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.terminal import Console, progress_bars

_REQUEST_TIMEOUT_S = 600
_NOW_AND_THEN = 0.2, 0.8  # shares of solved tries of a perfectible problem


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a Hugging Face folder, and the recipe that its tasks and lengths come from."""

    folder: Path
    recipe: Recipe | None

    @classmethod
    def find(cls, path: Path, recipe: Path | None) -> "Subject":
        """A finished run's export and its recipe, or a model's folder. Raises RecipeError."""
        if (path / "recipe.yaml").exists():
            if not (path / "export" / "config.json").exists():
                raise RecipeError(
                    f"{path} has no export/ yet: fp16rl convert to-hf {path}/checkpoints/latest FOLDER, then "
                    f"fp16rl eval FOLDER --recipe {path}/recipe.yaml"
                )
            return cls(path / "export", load(recipe or path / "recipe.yaml"))
        if not (path / "config.json").exists():
            raise RecipeError(f"{path} is neither a run directory nor a Hugging Face folder")
        return cls(path, load(recipe) if recipe else None)

    def server(self, dtype: Dtype | None, tensor_parallel: int, seed: int) -> ServerConfig:
        """Deterministic, so that an evaluation can be repeated. dtype: by default the recipe's, or fp16."""
        return ServerConfig(
            dtype or (self.recipe.precision.served if self.recipe else "fp16"),
            tensor_parallel,
            deterministic=True,
            sglang=self.recipe.rollout.sglang if self.recipe else {},
            seed=seed,
            head=self.recipe.precision.head if self.recipe else None,
        )


def parse_suites(texts: Sequence[str], **settings: float | None) -> list[Suite]:
    """Suites from --suite options. settings: fields of Suite that all share. Raises RecipeError."""
    suites = []
    for text in texts:
        try:
            suites.append(Suite(suite=text, **settings))
        except ValidationError as error:
            first = error.errors()[0]
            key = "" if first["loc"] == ("suite",) else f"{first['loc'][0]}={first['input']}: "
            raise RecipeError(
                f"--suite {text}: {key}{first['msg'].removeprefix('Value error, ')}"
            ) from None
    return suites


@dropped_if_unread()
def evaluate(
    subject: Subject,
    suites: Sequence[Suite],
    config: ServerConfig,
    out: Path,
    console: Console,
    servers: int = 1,
    perfectible: Path | None = None,
) -> dict[str, Any]:
    """Samples the responses that `out` does not hold yet; returns what it writes as result.json.

    perfectible: gets the problems of the first suite that are solved now and then. Raises RecipeError,
    ServerDied, ServerError and RewardError.
    """
    if perfectible is not None and suites[0].greedy:
        raise RecipeError("--perfectible needs a sampled suite first, e.g. FILE:avg@40")
    questions = plan(subject, suites, config)
    folders = {key: out / _name(one) for key, one in questions.items()}
    for key, one in questions.items():
        check_settings(
            folders[key] / "asked.json", _settings(subject, one, config), "responses", "--out"
        )
    rows: dict[tuple[str, bool], list[evaluation.Row]] = {}
    with progress_bars(console) as progress, contextlib.ExitStack() as stack:
        clients: list[Client] = []
        if not all(evaluation.is_complete(folders[k], q.responses) for k, q in questions.items()):
            bar = progress.add_task("servers start", total=None)
            running = launch_servers(config, subject.folder, out / "logs", servers)
            servers_up = stack.enter_context(running)
            clients = [Client(server.endpoint, _REQUEST_TIMEOUT_S) for server in servers_up]
            progress.remove_task(bar)
        for key, one in questions.items():
            bar = progress.add_task(_name(one), total=one.responses)
            rows[key], stats = evaluation.respond(
                *(clients, one, config.seed, folders[key]),
                functools.partial(progress.advance, bar),
            )
            stats.check(one.task.max_error_fraction)
    result: dict[str, Any] = {
        "model": str(subject.folder),
        "rows": [evaluation.measure(suite, rows[suite.source, suite.greedy]) for suite in suites],
    }
    if perfectible is not None:
        first = suites[0].source, suites[0].greedy
        problems = [questions[first].task.as_problem(p) for p in questions[first].prompts]
        kept = solved_now_and_then(rows[first], problems)
        write_json_lines(perfectible, kept)
        counts = {"problems": len(kept), "of": len(problems)}
        result["perfectible"] = {"file": str(perfectible), **counts}
    write_json(out / "result.json", result)
    return result


def plan(
    subject: Subject, suites: Sequence[Suite], config: ServerConfig
) -> dict[tuple[str, bool], Questions]:
    """The questions, by source and greedy: suites on the same problems share the responses.

    Raises RecipeError for a model that cannot be served, and for prompts that leave no room.
    """
    check_served_folder(subject.folder)
    tokenizer = load_tokenizer(subject.folder)
    length = subject.recipe.rollout.sglang.get("context_length") if subject.recipe else None
    context = int(length or load_config(subject.folder).max_position_embeddings)
    questions: dict[tuple[str, bool], Questions] = {}
    for suite in sorted(suites, key=lambda suite: -suite.k):  # those with the most tries first
        key = suite.source, suite.greedy
        if key in questions:
            continue
        questions[key] = one = Questions.of(suite, subject.recipe, tokenizer, 0)
        longest, tokens = max(len(p.ids) for p in one.prompts), one.sampling.max_new_tokens
        if longest + tokens > context:
            raise RecipeError(
                f"--suite {suite.source}: a prompt of {longest} tokens and a response of {tokens} "
                f"(--max-tokens) are more than the model's context of {context}"
            )
    return questions


def solved_now_and_then(
    rows: Sequence[evaluation.Row], problems: Sequence[tuple[str, str]]
) -> list[evaluation.Row]:
    """The problems that are solved in 20 to 80 % of their tries, with that share.

    problems: (problem, answer) of each prompt. The paper's sanity test trains on these (arXiv
    2510.26788, section 4): neither hopeless nor solved already.
    """
    low, high = _NOW_AND_THEN
    solved = (evaluation.rewards_of(rows) >= 1).mean(1)
    return [
        {"problem": problem, "answer": answer, "solved": float(share)}
        for (problem, answer), share in zip(problems, solved, strict=True)
        if low <= share <= high
    ]


def _name(questions: Questions) -> str:
    """The name of the folder with the responses."""
    how = "greedy" if questions.suite.greedy else f"sampled-{questions.suite.k}"
    return f"{questions.suite.name}-{how}"


def _settings(subject: Subject, questions: Questions, config: ServerConfig) -> dict[str, Any]:
    """What a folder of responses belongs to."""
    return {
        "model": str(subject.folder),
        "weights": weights_digest(subject.folder),
        "source": questions.suite.source,
        "tries": questions.suite.k,
        "dtype": config.dtype,
        "head": config.head,
        "sampling": asdict(questions.sampling),
        "seed": config.seed,
        "prompts": digest([prompt.ids for prompt in questions.prompts]),
    }
