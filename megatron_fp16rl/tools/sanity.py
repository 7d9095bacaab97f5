"""The paper's sanity test on a laptop: its six algorithms, in FP16 and in BF16, on perfectible problems.

A sound algorithm must learn to solve nearly all of the problems that a model solves now and then
(arXiv 2510.26788, section 4). `fp16rl bench sanity` makes weights and problems once, runs the cells of
the grid one after another, and continues where it stopped when it is called again.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import local
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import Row
from megatron_fp16rl.recipe import Recipe, Suite, load
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.rollout.server import ServerDied
from megatron_fp16rl.tools import evaluate
from megatron_fp16rl.utils.files import Unreadable, read_json, write_json
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.terminal import Console

RECIPES = Path(__file__).parents[2] / "recipes" / "sanity"
ALGORITHMS = ("grpo", "grpo-token-tis", "grpo-seq-mis", "gspo", "pg-seq-is", "pg-seq-mis")
DTYPES = ("fp16", "bf16")
_WINDOW = 10  # steps over which a reward is averaged
_COLLAPSED = 0.8  # of the best reward
_SOLVED = 0.95
_TRIES, _PROBLEMS = 40, 1000

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    algorithm: str
    dtype: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.algorithm}-{self.dtype}-seed{self.seed}"


def cells(only: Sequence[str], seeds: int) -> list[Cell]:
    """The grid, seed by seed: an interrupted grid has whole rows. only: algorithms; none: all."""
    return [
        Cell(algorithm, dtype, seed)
        for seed in range(seeds)
        for algorithm in ALGORITHMS
        if not only or algorithm in only
        for dtype in DTYPES
    ]


@dropped_if_unread()
def run(
    grid: Sequence[Cell], out: Path, overrides: Sequence[str], console: Console, say: Say
) -> list[dict[str, Any]]:
    """Runs the cells that are not done; returns a row for each. overrides: settings of all cells.

    A run that breaks is a result, with its reason. Raises as `fp16rl train` if the weights that all
    cells start from cannot be made.
    """
    model, problems = _prepare(out, overrides, console, say)
    rows = []
    for number, cell in enumerate(grid, 1):
        folder = out / "cells" / cell.name
        if not any((folder / name).exists() for name in ("summary.json", "failed.json")):
            say(f"cell {number} of {len(grid)}: {cell.name}")
            _run_cell(_recipe(cell, model, problems, out, overrides), folder, say)
        rows.append({**asdict(cell), **measure(folder)})
        write_json(out / "result.json", {"rows": rows})
    return rows


def measure(folder: Path) -> dict[str, Any]:
    """The figures of a cell's run. Rewards are means of ten steps; accuracies are of the whole set.

    collapsed: the run broke, or its last reward is less than 0.8 of its best. faults: of its metrics.
    """
    reason: str | None = None
    rows: list[Row] = []
    faults: list[str] = []
    try:
        if (folder / "failed.json").exists():
            reason = str(read_json(folder / "failed.json").get("reason"))
        log = metrics.read(folder)
        rows, faults = log.rows, log.faults
    except Unreadable as error:  # the other cells are shown all the same
        reason = str(error)

    def values(key: str) -> list[float]:
        return [row[key] for row in rows if row.get(key) is not None]

    means, mismatch = smooth(values("reward/mean"), _WINDOW), values("mismatch/logprob_abs_mean")
    best, last = max(means, default=0.0), means[-1] if means else 0.0
    return {
        "steps": len(rows),
        "reward_best": best,
        "reward_last": last,
        "accuracy_last": next(reversed(values("eval/accuracy")), None),
        "steps_to_95": next((i for i, mean in enumerate(means, 1) if mean >= _SOLVED), None),
        "mismatch_mean": sum(mismatch) / len(mismatch) if mismatch else None,
        "mismatch_max": max(mismatch, default=None),
        "skipped": rows[-1].get("fp16/skipped_total", 0) if rows else 0,
        "wall_s": sum(values("time/step_s")),
        "collapsed": reason is not None or last < _COLLAPSED * best,
        "reason": reason,
        "faults": faults,
    }


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _prepare(out: Path, overrides: Sequence[str], console: Console, say: Say) -> tuple[Path, Path]:
    """The weights and the problems of all cells: a Hugging Face folder, and a JSONL file."""
    start, problems = out / "start", out / "perfectible.jsonl"
    if not (start / "summary.json").exists():
        say("weights to start from: a warm start in fp16")
        shutil.rmtree(start, ignore_errors=True)
        _train(
            load(RECIPES / "tiny.yaml", [*overrides, "trainer.steps=0", "name=start"]), start, say
        )
    if not problems.exists():
        say(f"perfectible problems: {_TRIES} tries at each of {_PROBLEMS}")
        recipe = load(start / "recipe.yaml")
        subject = evaluate.Subject(start / "export", recipe)
        evaluate.evaluate(
            subject,
            [Suite(suite=f"training:avg@{_TRIES}", problems=_PROBLEMS)],
            subject.server("fp16", 1, seed=0),
            out / "perfectible",
            console,
            perfectible=problems,
        )
    return start / "export", problems


def _recipe(cell: Cell, model: Path, problems: Path, out: Path, overrides: Sequence[str]) -> Recipe:
    """The tiny base with the algorithm of the paper's recipe, from the common weights."""
    algorithm = load(RECIPES / f"{cell.algorithm}-{cell.dtype}.yaml").algorithm
    settings = [
        setting("name", cell.name),
        setting("model", {"path": str(model), "build": None}),
        setting("task.problems", str(problems)),
        "warm_start=null",
        f"precision={cell.dtype}",
        f"trainer.seed={cell.seed}",
        setting("trainer.run_root", str(out / "cells")),
        setting("algorithm", algorithm.model_dump(mode="json")),
    ]
    return load(RECIPES / "tiny.yaml", [*settings, *overrides])


def _run_cell(recipe: Recipe, folder: Path, say: Say) -> None:
    try:
        _train(recipe, folder, say)
    except (local.RankDied, ServerDied) as error:
        write_json(folder / "failed.json", {"reason": str(error).strip().splitlines()[-1]})


def _train(recipe: Recipe, folder: Path, say: Say) -> None:
    """Runs a recipe in `folder`, from its newest checkpoint if it has one."""
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    local.run(recipe, folder, say)
