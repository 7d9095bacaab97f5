"""`fp16rl eval`: from a model and suites to a table."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_fp16rl.learner.checkpoint_files import available
from megatron_fp16rl.models.check import check_served_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import Dtype, Recipe, RecipeError, Suite, load
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.evaluation import responses
from megatron_fp16rl.rollout.evaluation.responses import Questions
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.tools.settings_file import check_settings, digest, weights_digest
from megatron_fp16rl.utils.files import write_json, write_text
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.terminal import Console, progress_bars

_REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a Hugging Face folder, and the recipe that its tasks and lengths come from."""

    folder: Path
    recipe: Recipe | None

    @classmethod
    def find(
        cls, path: Path, recipe: Path | None, warn: Callable[[str], None] = lambda _: None
    ) -> "Subject":
        """A run directory's last weights and its recipe, or a model's folder.

        Of an unfinished run, the newest undamaged checkpoint is converted into eval/step_N. warn: gets
        a line about newer ones that are damaged. Raises RecipeError.
        """
        given = load(recipe) if recipe is not None else None
        if (path / "recipe.yaml").exists():
            return cls(_weights_of(path, warn), given or load(path / "recipe.yaml"))
        if not (path / "config.json").exists():
            raise RecipeError(f"{path} is neither a run directory nor a Hugging Face folder")
        return cls(path, given)


@dataclass(frozen=True)
class ServerSettings:
    """The servers of an evaluation; what is not given is the recipe's."""

    dtype: Dtype | None = None
    servers: int = 1
    tensor_parallel: int = 1
    seed: int = 0

    def config(self, recipe: Recipe | None) -> ServerConfig:
        """As they are started: deterministic, so that an evaluation can be repeated."""
        return ServerConfig(
            self.dtype or (recipe.precision.served if recipe else "fp16"),
            self.tensor_parallel,
            deterministic=True,
            sglang=recipe.rollout.sglang if recipe else {},
            seed=self.seed,
        )


@dataclass(frozen=True)
class Perfectible:
    """Which problems to keep: the share of solved tries lies in [low, high]."""

    out: Path
    low: float
    high: float


def parse_suites(texts: Sequence[str], **settings: float | None) -> list[Suite]:
    """Suites from --suite options. settings: fields of Suite that all share. Raises RecipeError."""
    suites = []
    for text in texts:
        try:
            suites.append(Suite(suite=text, **settings))
        except ValidationError as error:
            raise RecipeError(f"--suite {text}: {error.errors()[0]['msg']}") from None
    return suites


@dropped_if_unread()
def evaluate(
    subject: Subject,
    suites: Sequence[Suite],
    settings: ServerSettings,
    out: Path,
    console: Console,
    wanted: Perfectible | None = None,
) -> dict[str, Any]:
    """Samples the responses that `out` does not hold yet; returns what it writes as result.json.

    wanted: also writes the perfectible problems of the first suite. Raises RecipeError, ServerDied,
    ServerError and RewardError.
    """
    if wanted is not None and suites[0].greedy:
        raise RecipeError("--perfectible needs a sampled suite first, e.g. FILE:avg@40")
    config = settings.config(subject.recipe)
    questions = plan(subject, suites, config)
    folders = {key: out / _name(one) for key, one in questions.items()}
    for key, one in questions.items():
        check_settings(
            folders[key] / "asked.json", _settings(subject, one, config), "responses", "--out"
        )
    rows: dict[tuple[str, bool], list[responses.Row]] = {}
    with progress_bars(console) as progress, contextlib.ExitStack() as stack:
        clients: list[Client] = []
        if not all(responses.is_complete(folders[k], q.responses) for k, q in questions.items()):
            bar = progress.add_task("servers start", total=None)
            clients = stack.enter_context(_clients(subject, config, settings.servers, out))
            progress.remove_task(bar)
        for key, one in questions.items():
            bar = progress.add_task(_name(one), total=one.responses)
            rows[key], tally = responses.respond(
                *(clients, one, settings.seed, folders[key]),
                lambda done, bar=bar: progress.advance(bar, done),
            )
            tally.check(one.task.max_error_fraction)
    result: dict[str, Any] = {
        "model": str(subject.folder),
        "rows": [responses.measure(suite, rows[suite.source, suite.greedy]) for suite in suites],
    }
    if wanted is not None:
        first = suites[0].source, suites[0].greedy
        result["perfectible"] = _write_perfectible(wanted, questions[first], rows[first])
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
    given = config.sglang.get("context_length")
    context = int(given or load_config(subject.folder).max_position_embeddings)
    tries: dict[tuple[str, bool], int] = {}
    for suite in suites:
        key = suite.source, suite.greedy
        tries[key] = max(tries.get(key, 0), suite.k)
    questions: dict[tuple[str, bool], Questions] = {}
    for suite in suites:
        key = suite.source, suite.greedy
        if key not in questions:
            questions[key] = Questions.of(suite, subject.recipe, tokenizer, 0, tries[key])
            _check_room(questions[key], context)
    return questions


def _check_room(questions: Questions, context: int) -> None:
    """Raises RecipeError if servers would refuse a prompt because its response does not fit."""
    longest = max(len(prompt.ids) for prompt in questions.prompts)
    tokens = questions.sampling.max_new_tokens
    if longest + tokens > context:
        raise RecipeError(
            f"--suite {questions.suite.source}: a prompt of {longest} tokens and a response of {tokens} "
            f"(--max-tokens) are more than the model's context of {context}"
        )


def _name(questions: Questions) -> str:
    """The name of the folder with the responses."""
    how = "greedy" if questions.suite.greedy else f"sampled-{questions.tries}"
    return f"{questions.suite.name}-{how}"


@contextlib.contextmanager
def _clients(
    subject: Subject, config: ServerConfig, count: int, out: Path
) -> Iterator[list[Client]]:
    with launch_servers(config, subject.folder, out / "logs", count) as endpoints:
        yield [Client(endpoint, _REQUEST_TIMEOUT_S) for endpoint in endpoints]


def _write_perfectible(
    wanted: Perfectible, questions: Questions, rows: list[responses.Row]
) -> dict[str, Any]:
    problems = [questions.task.as_problem(prompt) for prompt in questions.prompts]
    kept = responses.perfectible(rows, problems, wanted.low, wanted.high)
    write_text(wanted.out, "".join(json.dumps(row) + "\n" for row in kept))
    return {"file": str(wanted.out), "problems": len(kept), "of": len(problems)}


def _settings(subject: Subject, questions: Questions, config: ServerConfig) -> dict[str, Any]:
    """What a folder of responses belongs to."""
    return {
        "model": str(subject.folder),
        "weights": weights_digest(subject.folder),
        "source": questions.suite.source,
        "tries": questions.tries,
        "dtype": config.dtype,
        "sampling": asdict(questions.sampling),
        "seed": config.seed,
        "prompts": digest([prompt.ids for prompt in questions.prompts]),
    }


def _weights_of(path: Path, warn: Callable[[str], None]) -> Path:
    """The Hugging Face folder of a run's last weights."""
    if (path / "export" / "config.json").exists():
        return path / "export"
    damaged = []
    for checkpoint in available(path / "checkpoints"):
        if not (faults := checkpoint.faults()):
            break
        damaged.append(f"; {faults[0]}")
    else:
        raise RecipeError(f"{path} has neither an export/ nor a whole checkpoint{''.join(damaged)}")
    if damaged:
        warn(f"asking {checkpoint.path}, the newest that is whole{''.join(damaged)}")
    folder = path / "eval" / checkpoint.path.name
    if not (folder / "config.json").exists():
        from megatron_fp16rl.tools import convert

        convert.to_hugging_face(checkpoint.path, folder)
    return folder
