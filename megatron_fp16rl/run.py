"""A run's directory: what is written there, and what is printed."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.batch import Sample
from megatron_fp16rl.files import write_json
from megatron_fp16rl.recipe import Recipe

if TYPE_CHECKING:  # a report reads this module, and needs no Megatron
    from megatron_fp16rl.learner.world import World

PARTS = ("rollout", "score", "update", "sync")  # of a step's wall time


class Run:
    """Times the parts of each step, keeps the metrics, writes them. Only rank 0 writes or prints."""

    def __init__(self, recipe: Recipe, folder: Path, world: "World") -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.history: list[dict[str, object]] = []
        self._current: dict[str, object] = {}
        self._tokens = 0
        self._began = time.monotonic()
        self._step_began = self._began
        self._tensorboard = None
        if world.is_first:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def say(self, line: str) -> None:
        """Prints a line, once."""
        if self.world.is_first:
            print(line, flush=True)

    def steps(self) -> Iterator[int]:
        """The steps of the run; the clock starts with the first."""
        self._began = self._step_began = time.monotonic()
        yield from range(self.recipe.trainer.steps)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `time/<part>_s` of this step."""
        began = time.monotonic()
        yield
        key = f"time/{part}_s"
        self._current[key] = self._current.get(key, 0.0) + time.monotonic() - began

    def record(self, metrics: dict[str, object]) -> None:
        """Adds metrics to this step."""
        self._current.update(metrics)

    def finish(self, step: int) -> None:
        """Closes a step: its line in metrics.jsonl, in TensorBoard, and on the terminal."""
        now = time.monotonic()
        self._tokens += self._current.get("tokens/step", 0)
        row = {
            "step": step,
            **self._current,
            "time/step_s": now - self._step_began,
            "tokens/total": self._tokens,
        }
        self._current, self._step_began = {}, now
        self.history.append(row)
        if not self.world.is_first:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        for key, value in row.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(key, value, step)
        self.say(self._line(row))

    def save_samples(self, label: str, samples: list[Sample], count: int = 16) -> None:
        """Keeps the first held-out responses, for the report: samples/<label>.json."""
        if self.world.is_first:
            rows = [asdict(s) for s in samples[:count]]
            write_json(self.folder / "samples" / f"{label}.json", rows)

    def summarise(self, before: float, after: float) -> dict[str, object]:
        """Writes summary.json and returns it."""
        wall = sum(row["time/step_s"] for row in self.history)
        mismatch = [row["mismatch/logprob_abs_mean"] for row in self.history]
        last = self.history[-1] if self.history else {}
        summary = {
            "accuracy_before": before,
            "accuracy_after": after,
            "wall_s": wall,
            "shares": {
                part: sum(row.get(f"time/{part}_s", 0.0) for row in self.history) / wall
                if wall
                else 0
                for part in PARTS
            },
            "skipped_total": last.get("fp16/skipped_total", 0),
            "mismatch_logprob_abs_mean": sum(mismatch) / len(mismatch) if mismatch else None,
            "steps": len(self.history),
            "tokens": self._tokens,
        }
        if self.world.is_first:
            write_json(self.folder / "summary.json", summary)
            self._tensorboard.close()
        return summary

    def _line(self, row: dict[str, object]) -> str:
        steps = self.recipe.trainer.steps
        done = row["step"] + 1
        left = (time.monotonic() - self._began) / done * (steps - done)
        parts = [
            f"step {done}/{steps}",
            f"reward {row['reward/mean']:.3f}",
            f"|dlogp| {row['mismatch/logprob_abs_mean']:.1e}",
        ]
        if "eval/accuracy" in row:
            parts.insert(2, f"held out {row['eval/accuracy']:.3f}")
        if row.get("grad/norm") is not None:
            parts.append(f"grad {row['grad/norm']:.2f}")
        if "fp16/loss_scale" in row:
            parts.append(f"scale 2^{_log2(row['fp16/loss_scale'])}")
        if row.get("fp16/overflow_source"):
            parts.append(f"skipped: {row['fp16/overflow_source']}")
        seconds = " ".join(f"{p} {row.get(f'time/{p}_s', 0.0):.2f}" for p in PARTS)
        parts.append(f"{row['time/step_s']:.2f} s ({seconds})")
        parts.append(f"{left / 60:.1f} min left")
        return " | ".join(parts)


def _log2(scale: float) -> str:
    import math

    return f"{math.log2(scale):g}"
