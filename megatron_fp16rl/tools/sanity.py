"""The paper's sanity test on a laptop: its six algorithms and DPPO, in FP16 and in BF16, on perfectible problems.

A sound algorithm must learn to solve nearly all of the problems that a model solves now and then
(arXiv 2510.26788, section 4). `fp16rl bench sanity` makes weights and problems once, runs the cells of
the grid one after another, and continues where it stopped when it is called again.
"""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from launch import local
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.recipe import Recipe, Suite, load
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.rollout.server import ServerDied
from megatron_fp16rl.tools import evaluate
from megatron_fp16rl.tools.report import figures
from megatron_fp16rl.utils.files import Unreadable, read_json, write_json
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.terminal import Console

RECIPES = Path(__file__).parents[2] / "recipes" / "sanity"
ALGORITHMS = ("grpo", "grpo-token-tis", "grpo-seq-mis", "gspo", "pg-seq-is", "pg-seq-mis", "dppo")
DTYPES = ("fp16", "bf16")
_WINDOW = 10  # steps over which a reward is averaged
_COLLAPSED = 0.8  # of the best reward
_SOLVED = 0.95
_TRIES, _PROBLEMS = 40, 1000


@dropped_if_unread()
def run(
    algorithms: Sequence[str], out: Path, overrides: Sequence[str], console: Console
) -> list[dict[str, Any]]:
    """Runs the cells that are not done; returns a row for each. overrides: settings of all cells.

    A run that breaks is a result, with its reason. Raises as `fp16rl train` if the weights that all
    cells start from cannot be made.
    """
    model, problems = _prepare(out, overrides, console)
    rows = []
    for algorithm in algorithms:
        for dtype in DTYPES:
            name = f"{algorithm}-{dtype}"
            folder = out / "cells" / name
            if not any((folder / done).exists() for done in ("summary.json", "failed.json")):
                console.print(name, style="dim")
                algorithm_settings = load(RECIPES / f"{name}.yaml").algorithm.model_dump(
                    mode="json"
                )
                settings = [
                    setting("name", name),
                    setting("model", {"path": str(model), "build": None}),
                    setting("task.problems", str(problems)),
                    "warm_start=null",
                    f"precision={dtype}",
                    setting("algorithm", algorithm_settings),
                ]
                try:
                    _train(load(RECIPES / "tiny.yaml", [*settings, *overrides]), folder, console)
                except (local.RankDied, ServerDied) as error:
                    reason = str(error).strip().splitlines()[-1]
                    write_json(folder / "failed.json", {"reason": reason})
            rows.append({"algorithm": algorithm, "dtype": dtype, **measure(folder)})
            write_json(out / "result.json", {"rows": rows})
    return rows


def measure(folder: Path) -> dict[str, Any]:
    """The figures of a cell's run. Rewards are means of ten steps; accuracies are of the whole set.

    collapsed: the run broke, or its last reward is less than 0.8 of its best. faults: of its metrics.
    """
    reason: str | None = None
    rows: list[metrics.Row] = []
    faults: list[str] = []
    try:
        if (folder / "failed.json").exists():
            reason = str(read_json(folder / "failed.json").get("reason"))
        log = metrics.read(folder)
        rows, faults = log.rows, log.faults
    except Unreadable as error:  # the other cells are shown all the same
        reason = str(error)
    means = metrics.values(figures.running_mean(rows, "reward/mean", _WINDOW), "reward/mean")
    mismatch = metrics.values(rows, "mismatch/logprob_abs_mean")
    best, last = max(means, default=0.0), means[-1] if means else 0.0
    return {
        "steps": len(rows),
        "reward_best": best,
        "reward_last": last,
        "accuracy_last": next(reversed(metrics.values(rows, "eval/accuracy")), None),
        "steps_to_95": next((i for i, mean in enumerate(means, 1) if mean >= _SOLVED), None),
        "mismatch_mean": sum(mismatch) / len(mismatch) if mismatch else None,
        "mismatch_max": max(mismatch, default=None),
        "skipped": rows[-1].get("fp16/skipped_total", 0) if rows else 0,
        "wall_s": sum(metrics.values(rows, "time/step_s")),
        "collapsed": reason is not None or last < _COLLAPSED * best,
        "reason": reason,
        "faults": faults,
    }


def write_curves(out: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Draws reward above and mismatch below, a column for each algorithm, fp16 against bf16."""
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    size = (2.6 * len(algorithms) + 0.8, 5.2)
    figure, axes = plt.subplots(
        2, len(algorithms), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for row in rows:
        steps: list[metrics.Row] = []
        with contextlib.suppress(Unreadable):  # the table has the reason
            steps = metrics.read(out / "cells" / f"{row['algorithm']}-{row['dtype']}").rows
        style = {"label": row["dtype"], "color": figures.DTYPE_COLOURS[row["dtype"]]}
        above, below = axes[:, algorithms.index(row["algorithm"])]
        above.set_title(row["algorithm"], fontsize=10)
        smooth = figures.running_mean(steps, "reward/mean", _WINDOW)
        figures.plot(above, smooth, "reward/mean", **style)
        figures.plot(below, steps, "mismatch/logprob_abs_mean", **style)
        below.set_yscale("log")
        below.set_xlabel("step")
    figures.tidy(axes.flat)
    axes[0, 0].set_ylabel("training reward")
    axes[1, 0].set_ylabel("mean |log pi - log mu|")
    axes[0, 0].legend(fontsize=8)
    figures.to_png(figure, out / "curves.png")
    return out / "curves.png"


def _prepare(out: Path, overrides: Sequence[str], console: Console) -> tuple[Path, Path]:
    """The weights and the problems of all cells: a Hugging Face folder, and a JSONL file."""
    start, problems = out / "start", out / "perfectible.jsonl"
    if not (start / "summary.json").exists():
        console.print("weights to start from: a warm start in fp16", style="dim")
        shutil.rmtree(start, ignore_errors=True)
        warm_start = load(RECIPES / "tiny.yaml", [*overrides, "trainer.steps=0", "name=start"])
        _train(warm_start, start, console)
    if not problems.exists():
        console.print(f"perfectible problems: {_TRIES} tries at each of {_PROBLEMS}", style="dim")
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


def _train(recipe: Recipe, folder: Path, console: Console) -> None:
    """Runs a recipe in `folder`, from its newest checkpoint if it has one."""
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    local.run(recipe, folder, lambda line: console.print(line, style="dim"))
