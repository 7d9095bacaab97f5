"""The paper's sanity test on a laptop: its six algorithms, in FP16 and in BF16, on perfectible problems.

A sound algorithm must learn to solve nearly all of the problems that a model solves now and then
(arXiv 2510.26788, section 4). `fp16rl bench sanity` makes the weights and the problems once, runs the
cells of the grid one after another, and goes on where it stopped when it is called again.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import local
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.recipe import Recipe, load
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.rollout.client import Sampling
from megatron_fp16rl.rollout.evaluation.suites import Suite
from megatron_fp16rl.rollout.server import ServerDied
from megatron_fp16rl.tools import evaluate as command
from megatron_fp16rl.utils.files import Unreadable, read_json, write_json
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.terminal import Console

RECIPES = Path(__file__).parents[2] / "recipes" / "sanity"
ALGORITHMS = ("grpo", "grpo-token-tis", "grpo-seq-mis", "gspo", "pg-seq-is", "pg-seq-mis")
DTYPES = ("fp16", "bf16")
_WINDOW = 10  # steps over which a reward is a mean
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
    """The grid: seed by seed, so that a grid that is stopped has whole rows. only: algorithms."""
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
) -> list[dict[str, object]]:
    """Runs what is not done of the grid; returns its rows. overrides: settings of all cells.

    A cell whose run breaks is a result, with the reason. Raises what `fp16rl train` raises if the
    weights that all cells start from cannot be made.
    """
    model, problems = _prepare(out, overrides, console, say)
    rows = []
    for number, cell in enumerate(grid, 1):
        folder = out / "cells" / cell.name
        if not _is_done(folder):
            say(f"cell {number} of {len(grid)}: {cell.name}")
            _run_cell(_recipe(cell, model, problems, out, overrides), folder, say)
        rows.append({**vars(cell), **measure(folder)})
        write_json(out / "result.json", {"rows": rows})
    return rows


def measure(folder: Path) -> dict[str, object]:
    """What a cell's run came to. Rewards are means of ten steps; accuracies are of the whole set.

    collapsed: the run broke, or its last reward is less than 0.8 of its best. faults: of its metrics.
    """
    failed = folder / "failed.json"
    reason, steps, faults = None, [], []
    try:
        if failed.exists():
            reason = str(read_json(failed).get("reason"))
        found = metrics.read(folder)
        steps, faults = found.rows, found.faults
    except Unreadable as error:  # the other cells are shown all the same
        reason = str(error)
    rewards = [row["reward/mean"] for row in steps if row.get("reward/mean") is not None]
    means = [
        sum(rewards[max(0, i - _WINDOW + 1) : i + 1]) / min(i + 1, _WINDOW)
        for i in range(len(rewards))
    ]
    accuracies = [row["eval/accuracy"] for row in steps if row.get("eval/accuracy") is not None]
    apart = [a for row in steps if (a := row.get("mismatch/logprob_abs_mean")) is not None]
    best, last = max(means, default=0.0), means[-1] if means else 0.0
    return {
        "steps": len(steps),
        "reward_best": best,
        "reward_last": last,
        "accuracy_last": accuracies[-1] if accuracies else None,
        "steps_to_95": next((i + 1 for i, mean in enumerate(means) if mean >= _SOLVED), None),
        "mismatch_mean": sum(apart) / len(apart) if apart else None,
        "mismatch_max": max(apart, default=None),
        "skipped": steps[-1].get("fp16/skipped_total", 0) if steps else 0,
        "wall_s": sum(row.get("time/step_s") or 0.0 for row in steps),
        "collapsed": reason is not None or last < _COLLAPSED * best,
        "reason": reason,
        "faults": faults,
    }


def _prepare(out: Path, overrides: Sequence[str], console: Console, say: Say) -> tuple[Path, Path]:
    """The weights and the problems of all cells: a Hugging Face folder, and a JSONL file."""
    start, problems = out / "start", out / "perfectible.jsonl"
    if not (start / "summary.json").exists():
        say("weights to start from: a warm start in fp16")
        shutil.rmtree(start, ignore_errors=True)
        start.mkdir(parents=True)
        base = load(RECIPES / "tiny.yaml", [*overrides, "trainer.steps=0", "name=start"])
        local.run(base, start, say)
    if not problems.exists():
        say(f"perfectible problems: {_TRIES} tries at each of {_PROBLEMS}")
        recipe = load(start / "recipe.yaml")
        settings = command.Settings(
            Sampling(recipe.rollout.max_new_tokens), "fp16", problems=_PROBLEMS
        )
        command.evaluate(
            command.Subject(start / "export", recipe),
            [Suite("training", "avg", _TRIES)],
            settings,
            out / "perfectible",
            console,
            command.Perfectible(problems, 0.2, 0.8),
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


def _is_done(folder: Path) -> bool:
    return (folder / "summary.json").exists() or (folder / "failed.json").exists()


def _run_cell(recipe: Recipe, folder: Path, say: Say) -> None:
    """Runs a cell, from its newest checkpoint if it has one."""
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        local.run(recipe, folder, say)
    except (local.RankDied, ServerDied) as error:
        write_json(folder / "failed.json", {"reason": str(error).strip().splitlines()[-1]})
