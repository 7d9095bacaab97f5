"""`fp16rl eval`: from a model and suites to a table."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.tasks import Task, make
from megatron_fp16rl.learner.checkpoint_files import available
from megatron_fp16rl.models.check import check_served_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import Dtype, Recipe, RecipeError, load
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.evaluation import run
from megatron_fp16rl.rollout.evaluation.suites import Suite, prompts_of, task_of
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.utils.files import write_json, write_text
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.terminal import Console, progress_bars

_MAX_TOKENS = 1024  # of a response, where neither a recipe nor an option says
_TIMEOUT_S = 600  # of one request


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a Hugging Face folder, and the recipe whose tasks and lengths go with it."""

    folder: Path
    recipe: Recipe | None

    @classmethod
    def find(
        cls, path: Path, recipe: Path | None, warn: Callable[[str], None] = lambda _: None
    ) -> "Subject":
        """A run directory's last weights and its recipe, or a model's folder.

        Of a run that is not finished, the newest whole checkpoint is written to eval/step_N. warn: told
        of newer ones that are damaged. Raises RecipeError.
        """
        given = load(recipe) if recipe is not None else None
        if not (path / "recipe.yaml").exists():
            if not (path / "config.json").exists():
                raise RecipeError(f"{path} is neither a run directory nor a Hugging Face folder")
            return cls(path, given)
        return cls(_weights_of(path, warn), given or load(path / "recipe.yaml"))


@dataclass(frozen=True)
class Settings:
    """How it is evaluated."""

    sampling: Sampling
    dtype: Dtype
    servers: int = 1
    tensor_parallel: int = 1
    seed: int = 0
    problems: int | None = None  # at most so many of each suite
    sglang: dict[str, object] | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe | None,
        temperature: float,
        top_p: float,
        max_tokens: int | None,
        dtype: Dtype | None,
        **more: int | None,
    ) -> "Settings":
        """What is not given is the recipe's, as are its stops and its servers' options."""
        if recipe is None:
            sampling = Sampling(max_tokens or _MAX_TOKENS, temperature, top_p)
            return cls(sampling, dtype or "fp16", **more)
        rollout = recipe.rollout
        tokens, stop = max_tokens or rollout.max_new_tokens, tuple(rollout.stop)
        sampling = Sampling(tokens, temperature, top_p, stop)
        return cls(sampling, dtype or recipe.precision.served, sglang=rollout.sglang, **more)


@dataclass(frozen=True)
class Perfectible:
    """Which problems to keep: solved in a share of the tries within [low, high]."""

    out: Path
    low: float
    high: float


@dataclass(frozen=True)
class _Want:
    """Responses that are wanted; suites on the same problems share them."""

    suite: Suite  # one of those
    task: Task
    prompts: list[Prompt]
    tries: int
    sampling: Sampling

    @property
    def name(self) -> str:
        how = "greedy" if self.suite.greedy else f"sampled-{self.tries}"
        return f"{self.suite.name}-{how}"


@dropped_if_unread()
def evaluate(
    subject: Subject,
    suites: Sequence[Suite],
    settings: Settings,
    out: Path,
    console: Console,
    wanted: Perfectible | None = None,
) -> dict[str, object]:
    """Asks what is not answered yet and writes result.json; returns what is in it.

    wanted: also writes the perfectible problems of the first suite. Raises RecipeError, ServerDied,
    ServerError and RewardError.
    """
    if wanted is not None and suites[0].greedy:
        raise RecipeError("--perfectible needs a sampled suite first, e.g. FILE:avg@40")
    wants = _plan(subject, suites, settings)
    for want in wants:
        run.claim(out / want.name, _asked(subject, want, settings))
    with progress_bars(console) as progress, contextlib.ExitStack() as stack:
        clients: list[Client] = []
        if not all(run.is_complete(out / w.name, len(w.prompts) * w.tries) for w in wants):
            bar = progress.add_task("servers start", total=None)
            clients = stack.enter_context(_clients(subject, settings, out))
            progress.remove_task(bar)
        found = [_respond(want, clients, settings.seed, out, progress) for want in wants]
    rows = {(w.suite.source, w.suite.greedy): r for w, r in zip(wants, found, strict=True)}
    result: dict[str, object] = {
        "model": str(subject.folder),
        "rows": [run.measure(suite, rows[suite.source, suite.greedy]) for suite in suites],
    }
    if wanted is not None:
        result["perfectible"] = _perfectible(wanted, wants[0], found[0])
    write_json(out / "result.json", result)
    return result


def _plan(subject: Subject, suites: Sequence[Suite], settings: Settings) -> list[_Want]:
    check_served_folder(subject.folder)
    tokenizer = load_tokenizer(subject.folder)
    given = (settings.sglang or {}).get("context_length")
    context = int(given or load_config(subject.folder).max_position_embeddings)
    wants: list[_Want] = []
    for (source, greedy), tries in run.shared(suites).items():
        suite = next(s for s in suites if (s.source, s.greedy) == (source, greedy))
        task = make(task_of(suite, subject.recipe), tokenizer, 0)
        prompts = prompts_of(suite, task, settings.problems)
        sampling = run.greedy(settings.sampling) if greedy else settings.sampling
        wants.append(_Want(suite, task, prompts, tries, sampling))
        _check_room(wants[-1], context)
    return wants


def _check_room(want: _Want, context: int) -> None:
    """Raises RecipeError if servers would refuse a prompt for want of room."""
    longest, tokens = max(len(p.ids) for p in want.prompts), want.sampling.max_new_tokens
    if longest + tokens > context:
        raise RecipeError(
            f"--suite {want.suite.source}: a prompt of {longest} tokens and a response of {tokens} "
            f"(--max-tokens) are more than the model's context of {context}"
        )


@contextlib.contextmanager
def _clients(subject: Subject, settings: Settings, out: Path) -> Iterator[list[Client]]:
    config = ServerConfig(
        settings.dtype,
        settings.tensor_parallel,
        deterministic=True,
        sglang=settings.sglang or {},
        seed=settings.seed,
    )
    logs = out / "logs"
    with launch_servers(config, subject.folder, logs, settings.servers) as endpoints:
        yield [Client(endpoint, _TIMEOUT_S) for endpoint in endpoints]


def _respond(
    want: _Want, clients: list[Client], seed: int, out: Path, progress: Progress
) -> list[run.Row]:
    bar = progress.add_task(want.name, total=len(want.prompts) * want.tries)
    rows, tally = run.respond(
        clients,
        want.task,
        want.prompts,
        want.tries,
        want.sampling,
        seed,
        out / want.name,
        lambda done: progress.advance(bar, done),
    )
    tally.check(want.task.max_error_fraction)
    return rows


def _perfectible(wanted: Perfectible, want: _Want, rows: list[run.Row]) -> dict[str, object]:
    problems = [want.task.as_problem(prompt) for prompt in want.prompts]
    found = run.perfectible(rows, problems, wanted.low, wanted.high)
    write_text(wanted.out, "".join(json.dumps(row) + "\n" for row in found))
    return {"file": str(wanted.out), "problems": len(found), "of": len(problems)}


def _asked(subject: Subject, want: _Want, settings: Settings) -> run.Asked:
    files = sorted(subject.folder.glob("*.safetensors"))
    return run.Asked(
        model=str(subject.folder),
        weights=_digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]),
        source=want.suite.source,
        tries=want.tries,
        dtype=settings.dtype,
        sampling=want.sampling,
        seed=settings.seed,
        prompts=_digest([prompt.ids for prompt in want.prompts]),
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _weights_of(path: Path, warn: Callable[[str], None]) -> Path:
    if (path / "export" / "config.json").exists():
        return path / "export"
    damaged = []
    for found in available(path / "checkpoints"):
        if not (faults := found.faults()):
            break
        damaged.append(f"; {faults[0]}")
    else:
        raise RecipeError(f"{path} has neither an export/ nor a whole checkpoint{''.join(damaged)}")
    if damaged:
        warn(f"asking {found.path}, the newest that is whole{''.join(damaged)}")
    folder = path / "eval" / found.path.name
    if not (folder / "config.json").exists():
        from megatron_fp16rl.tools import convert

        convert.to_hugging_face(found.path, folder)
    return folder
