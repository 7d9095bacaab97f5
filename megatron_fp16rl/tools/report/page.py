"""Writing report.html: one file that needs nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.recipe import HIDDEN, RecipeError, notation
from megatron_fp16rl.tools.report import figures
from megatron_fp16rl.utils.files import write_text

Warn = Callable[[str], None]


class _Summary(BaseModel):
    """Of summary.json what is shown; see run.py."""

    accuracy_before: float | None
    accuracy_after: float | None
    wall_s: float
    shares: dict[str, float]
    skipped_total: float
    mismatch_logprob_abs_mean: float | None
    steps: int


class _Prompt(BaseModel):
    text: str
    answer: str


class _Sample(BaseModel):
    """Of a response in samples/ what is shown."""

    prompt: _Prompt
    text: str
    reward: float
    truncated: bool


def write_report(
    folder: Path,
    warn: Warn,
    out: Path | None = None,
    png: Path | None = None,
    refresh_s: float | None = None,
) -> Path:
    """Writes a page about what the run wrote so far, and its picture to `png`; returns the page's path.

    out: the page; default: folder/report.html.
    warn: called with a line for each part that is damaged, and left out. refresh_s: browsers read the page
    again after so many seconds. Raises RecipeError if there is no step, Unreadable.
    """
    rows = steps(folder, warn)
    summary = _part(folder / "summary.json", _Summary, warn)

    def overview() -> Figure:
        return figures.overview(rows, folder.name, summary and summary.accuracy_before)

    if png is not None:
        figures.to_png(overview(), png)
    recipe = recipe_values(folder / "recipe.yaml", warn)
    page = render(
        "page.html.j2",
        name=folder.name,
        refresh_s=refresh_s,
        summary=summary,
        steps=len(rows),
        figure=figures.to_svg(overview()),
        samples=_paired_samples(folder, warn),
        last=rows[-1],
        recipe=notation.write(recipe) if recipe else "",
    )
    out = out or folder / "report.html"
    write_text(out, page)
    return out


def steps(folder: Path, warn: Warn) -> list[metrics.Row]:
    """The steps of a run, of which there is at least one. Raises RecipeError, Unreadable."""
    log = metrics.read(folder)
    for fault in log.faults:
        warn(f"{fault}: left out")
    if not log.rows:
        raise RecipeError(
            f"{folder} holds no {metrics.METRICS} with a step: it is not a run, or has no step yet"
        )
    return log.rows


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder; what runs wrote is text in it, not markup."""
    environment = Environment(
        loader=PackageLoader("megatron_fp16rl.tools.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def _paired_samples(folder: Path, warn: Warn) -> list[tuple[_Sample, _Sample | None]]:
    """Responses to the same prompts before and after the run."""
    before = _part(folder / "samples" / "before.json", list[_Sample], warn) or []
    after = _part(folder / "samples" / "after.json", list[_Sample], warn) or []
    if len(after) != len(before):  # trainer.eval_prompts was changed on the way
        after = [None] * len(before)
    return list(zip(before, after, strict=True))


def recipe_values(file: Path, warn: Warn) -> dict[str, Any]:
    """A run's recipe, empty if it cannot be read, without the values of slurm.environment: a report is there to be sent around."""
    try:
        values = notation.read_file(file)
    except RecipeError as error:
        warn(f"{error}: left out")
        return {}
    match values:
        case {"slurm": {"environment": dict(environment)}}:
            values["slurm"]["environment"] = dict.fromkeys(environment, HIDDEN)
    return values


def _part(file: Path, shape: Any, warn: Warn) -> Any:
    """The content of a JSON file; None if it is absent, or not of that `shape`."""
    try:
        return TypeAdapter(shape).validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"{file} is left out: {error.strerror}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        warn(f"{file} is left out: {where and where + ': '}{first['msg']}")
    return None
