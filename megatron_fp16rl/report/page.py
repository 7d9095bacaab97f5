"""Writing report.html: one file that needs nothing else."""

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from megatron_fp16rl.files import write_text
from megatron_fp16rl.report import figures


def read_metrics(folder: Path) -> list[dict[str, object]]:
    """The rows of metrics.jsonl. Raises FileNotFoundError if this is no run directory."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no metrics.jsonl: it is not a run, or has no step yet"
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def overview(folder: Path) -> Figure:
    """The pictures of a run."""
    summary = _read_json(folder / "summary.json") or {}
    return figures.overview(read_metrics(folder), folder.name, summary.get("accuracy_before"))


def write_report(folder: Path) -> Path:
    """Writes folder/report.html from what the run wrote so far; returns its path."""
    rows = read_metrics(folder)
    summary = _read_json(folder / "summary.json")
    environment = Environment(
        loader=PackageLoader("megatron_fp16rl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    page = environment.get_template("page.html.j2").render(
        name=folder.name,
        summary=summary,
        steps=len(rows),
        figure=figures.to_svg(overview(folder)),
        samples=_paired_samples(folder),
        last=rows[-1],
        recipe=(folder / "recipe.yaml").read_text(),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _paired_samples(folder: Path) -> list[tuple[dict, dict | None]]:
    """Responses to the same prompts before and after the run."""
    before = _read_json(folder / "samples" / "before.json") or []
    after = _read_json(folder / "samples" / "after.json") or [None] * len(before)
    return list(zip(before, after, strict=True))


def _read_json(path: Path) -> object | None:
    return json.loads(path.read_text()) if path.exists() else None
