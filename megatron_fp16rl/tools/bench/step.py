"""Where the time of whole training steps goes."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import METRICS
from megatron_fp16rl.metrics.run import PARTS
from megatron_fp16rl.recipe import Recipe, RecipeError, load

_BESIDE = ("eval", "checkpoint")  # not every step has them


def for_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with so many steps, and nothing beside them but what ends every run."""
    changes = {"steps": steps, "eval_every": steps, "suites": [], "eval_prompts": 1}
    return recipe.model_copy(
        update={
            "trainer": recipe.trainer.model_copy(update=changes),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": steps}),
            "gates": [],
        }
    )


def run(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """Runs a recipe on this machine, as `fp16rl train` does. Raises what that raises."""
    from launch import local

    local.run(recipe, folder, say)


def measure(folder: Path, warm_up: int) -> dict[str, object]:
    """Medians and shares over the steps of a run directory, without the first `warm_up`.

    A run that still goes on will do. `faults`: lines of its metrics that are no steps. Raises
    RecipeError if there is nothing to measure, Unreadable.
    """
    if not (folder / METRICS).exists():
        raise RecipeError(
            f"{folder} holds no {METRICS}: it is no run directory, or has made no step"
        )
    found = metrics.read(folder)
    rows = [row for row in found.rows if row.get("time/step_s") and "tokens/step" in row]
    if len(rows) <= warm_up:
        raise RecipeError(
            f"{folder} has {len(rows)} step(s), of which {warm_up} are for warming up"
            + "".join(f"; {fault}" for fault in found.faults[:1])
        )
    ranks = load(folder / "recipe.yaml").learner.ranks
    about = {"run": str(folder), "ranks": ranks, "faults": found.faults}
    return {**about, **shares(rows[warm_up:], ranks)}


def shares(rows: Sequence[dict], ranks: int) -> dict[str, object]:
    """Of rows of metrics.jsonl. Evaluations and checkpoints are not counted as part of a step."""
    wall = [
        row["time/step_s"] - sum(row.get(f"time/{part}_s", 0.0) for part in _BESIDE) for row in rows
    ]
    parts = {part: [row.get(f"time/{part}_s", 0.0) for row in rows] for part in PARTS}
    parts["other"] = [whole - sum(parts[part][i] for part in PARTS) for i, whole in enumerate(wall)]
    speeds = [row["tokens/step"] / whole for row, whole in zip(rows, wall, strict=True)]
    return {
        "steps": len(rows),
        **_spread("step_s", wall),
        **_spread("tokens_per_s", speeds),
        "tokens_per_s_per_rank": statistics.median(speeds) / ranks,
        "rows": [
            {"part": part, "share": sum(own) / sum(wall), **_spread("seconds", own)}
            for part, own in parts.items()
        ],
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        name: statistics.median(values),
        f"{name}_low": min(values),
        f"{name}_high": max(values),
    }
