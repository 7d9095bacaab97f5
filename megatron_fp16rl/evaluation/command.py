"""`fp16rl eval`: from a model and suites to a table."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_fp16rl.checkpoints import available
from megatron_fp16rl.evaluation import run
from megatron_fp16rl.evaluation.suites import Suite, prompts_of, task_of
from megatron_fp16rl.files import write_json, write_text
from megatron_fp16rl.recipe import Dtype, Recipe, RecipeError, Rollout, load
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.server import Serving, serving
from megatron_fp16rl.tasks import Task, make


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a Hugging Face folder, and the recipe whose tasks and lengths go with it."""

    folder: Path
    recipe: Recipe | None

    @classmethod
    def find(cls, path: Path, recipe: Path | None) -> "Subject":
        """A run directory's last weights and its recipe, or a model's folder.

        Of a run that is not finished, the newest checkpoint is written to eval/step_N. Raises
        RecipeError.
        """
        given = load(recipe) if recipe is not None else None
        if not (path / "recipe.yaml").exists():
            if not (path / "config.json").exists():
                raise RecipeError(f"{path} is neither a run directory nor a Hugging Face folder")
            return cls(path, given)
        return cls(_weights_of(path), given or load(path / "recipe.yaml"))


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


@dataclass(frozen=True)
class Perfectible:
    """Which problems to keep: solved in a share of the tries within [low, high]."""

    out: Path
    low: float
    high: float


def evaluate(
    subject: Subject,
    suites: Sequence[Suite],
    settings: Settings,
    out: Path,
    console: Console,
    wanted: Perfectible | None = None,
) -> dict[str, object]:
    """Starts servers, asks what is not answered yet, writes result.json; returns what is in it.

    wanted: also writes the perfectible problems of the first suite. Raises RecipeError, ServerDied,
    ServerError and RewardError.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    rollout = Rollout(
        prompts=1,
        samples=1,
        max_new_tokens=settings.sampling.max_new_tokens,
        servers=settings.servers,
        tensor_parallel=settings.tensor_parallel,
        deterministic=True,
        sglang=settings.sglang or {},
    )
    tasks = {suite.source: make(task_of(suite, subject.recipe), tokenizer, 0) for suite in suites}
    result: dict[str, object] = {"model": str(subject.folder), "rows": []}
    serves = Serving(rollout, settings.dtype, settings.seed)
    with (
        Progress(console=console) as progress,
        serving(serves, subject.folder, out / "logs", lambda _: None) as endpoints,
    ):
        clients = [Client(endpoint, rollout.request_timeout_s) for endpoint in endpoints]
        answered = {}
        for (source, greedy), tries in run.shared(suites).items():
            suite = next(s for s in suites if s.source == source)
            task = tasks[source]
            prompts = prompts_of(suite, task, settings.problems)
            sampling = run.greedy(settings.sampling) if greedy else settings.sampling
            folder = out / f"{suite.name}-{'greedy' if greedy else f'sampled-{tries}'}"
            run.claim(folder, _asked(subject, suite, tries, settings, sampling, prompts))
            name = f"{suite.name}{' greedy' if greedy else ''}"
            bar = progress.add_task(name, total=len(prompts) * tries)
            rows, tally = run.respond(
                clients,
                task,
                prompts,
                tries,
                sampling,
                settings.seed,
                folder,
                lambda done, bar=bar: progress.advance(bar, done),
            )
            tally.check(task.max_error_fraction)
            answered[source, greedy] = (rows, prompts)
    for suite in suites:
        result["rows"].append(run.measure(suite, answered[suite.source, suite.greedy][0]))
    if wanted is not None:
        first = suites[0]
        result["perfectible"] = _perfectible(
            wanted, tasks[first.source], *answered[first.source, False]
        )
    write_json(out / "result.json", result)
    return result


def _perfectible(wanted: Perfectible, task: Task, rows: list, prompts: list) -> dict[str, object]:
    problems = [task.as_problem(prompt) for prompt in prompts]
    found = run.perfectible(rows, problems, wanted.low, wanted.high)
    write_text(wanted.out, "".join(json.dumps(row) + "\n" for row in found))
    return {"file": str(wanted.out), "problems": len(found), "of": len(problems)}


def _asked(
    subject: Subject,
    suite: Suite,
    tries: int,
    settings: Settings,
    sampling: Sampling,
    prompts: list,
) -> run.Asked:
    files = sorted(subject.folder.glob("*.safetensors"))
    return run.Asked(
        model=str(subject.folder),
        weights=_digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]),
        source=suite.source,
        tries=tries,
        dtype=settings.dtype,
        sampling=sampling,
        seed=settings.seed,
        prompts=_digest([prompt.ids for prompt in prompts]),
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _weights_of(path: Path) -> Path:
    if (path / "export" / "config.json").exists():
        return path / "export"
    found = next(iter(available(path / "checkpoints")), None)
    if found is None:
        raise RecipeError(f"{path} has neither an export/ nor a checkpoint yet")
    folder = path / "eval" / found.path.name
    if not (folder / "config.json").exists():
        from megatron_fp16rl import convert

        convert.to_hugging_face(found.path, folder)
    return folder
