"""The parts of whole training steps: rollout, score, update, sync."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import PARTS, seconds
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.tools.bench.common import Result, spread

_BESIDE = ("eval", "checkpoint")  # timed within a step, but not every step has them


def measure(folder: Path, warm_up: int) -> Result:
    """Medians and shares over the steps of a run directory, without the first `warm_up`.

    The run may still go on. Raises RecipeError if there is no step to measure, Unreadable.
    """
    if not (folder / metrics.METRICS).exists():
        raise RecipeError(
            f"{folder} holds no {metrics.METRICS}: it is no run directory, or has made no step"
        )
    log = metrics.read(folder)
    rows = [row for row in log.rows if row.get("time/step_s") and "tokens/step" in row]
    if len(rows) <= warm_up:
        raise RecipeError(
            f"{folder} has {len(rows)} step(s), of which {warm_up} are for warming up"
            + "".join(f"; {fault}" for fault in log.faults[:1])
        )
    ranks = load(folder / "recipe.yaml").learner.ranks
    about = {"run": str(folder), "ranks": ranks, "faults": log.faults}
    return {**about, **shares(rows[warm_up:], ranks)}


def shares(rows: Sequence[metrics.Row], ranks: int) -> Result:
    """Times and shares of the parts over rows of metrics.jsonl, without evaluations and checkpoints.

    overlap: the share of sampling that the learner did not wait for, because it worked meanwhile.
    step_over_longest: the steps' time over that of sampling or of learning (score, update), whichever is
    longer: 1 if nothing else takes time.
    """
    wall = [
        row["time/step_s"] - sum(row.get(f"time/{part}_s", 0.0) for part in _BESIDE) for row in rows
    ]
    parts = {part: [seconds(row, part) for row in rows] for part in PARTS}
    sampling = [row.get("time/rollout_s", 0.0) for row in rows]
    learning = [
        score + update for score, update in zip(parts["score"], parts["update"], strict=True)
    ]
    longest = max(sum(sampling), sum(learning))
    parts["other"] = [whole - sum(parts[part][i] for part in PARTS) for i, whole in enumerate(wall)]
    speeds = [row["tokens/step"] / whole for row, whole in zip(rows, wall, strict=True)]
    return {
        "steps": len(rows),
        **spread("step_s", wall),
        **spread("tokens_per_s", speeds),
        "tokens_per_s_per_rank": statistics.median(speeds) / ranks,
        "parts": {part: statistics.median(own) for part, own in parts.items()},
        "sampling_s": statistics.median(sampling),
        "overlap": 1 - sum(parts["rollout"]) / sum(sampling) if any(sampling) else 0.0,
        "step_over_longest": sum(wall) / longest if longest else 0.0,
        "rows": [
            {"part": part, "share": sum(own) / sum(wall), **spread("seconds", own)}
            for part, own in parts.items()
        ],
    }
