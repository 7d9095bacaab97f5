"""The run directory: metrics.jsonl, trackers, samples, summary; and the lines on the terminal."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.data.batch import Sample
from megatron_fp16rl.metrics import gates
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import METRICS, PARTS, Row, seconds
from megatron_fp16rl.metrics.trackers import Trackers
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import write_json, write_text

if TYPE_CHECKING:  # a report reads this module, and needs no Megatron
    from megatron_fp16rl.parallel import World


class Run:
    """Times the parts of each step, keeps the metrics, writes them. Only rank 0 writes or prints."""

    def __init__(self, recipe: Recipe, folder: Path, world: "World") -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.history: list[Row] = []
        self.gates = gates.of(recipe)
        self._current: Row = {}
        self.tokens = 0
        self._first_step = 0
        self._start_time = time.monotonic()
        self._step_start_time = self._start_time
        self._trackers: Trackers | None = None  # of rank 0, from `resume` on

    def say(self, line: str) -> None:
        if self.world.is_rank0:
            print(line, flush=True)

    def resume(self, step: int, tokens: int) -> None:
        """Begins, or continues, at `step`, and opens the trackers. Raises Unreadable.

        Lines of later steps, and lines that are no steps, move to metrics.undone.jsonl.
        """
        self.tokens = tokens
        if not self.world.is_rank0:
            return
        file, undone = self.folder / METRICS, self.folder / "metrics.undone.jsonl"
        resumed_at = None
        if file.exists():
            resumed_at = step
            written = metrics.read(self.folder)
            for fault in written.faults:
                self.say(f"{fault}: moved to {undone.name}")
            rows = list(zip(written.rows, written.lines, strict=True))
            self.history = [row for row, _ in rows if row["step"] < step]
            if undone_lines := written.faulty + [line for row, line in rows if row["step"] >= step]:
                with undone.open("ab") as kept:
                    kept.writelines(undone_lines)
            write_text(file, b"".join(line for row, line in rows if row["step"] < step).decode())
        self._trackers = Trackers(self.recipe, self.folder, self.say, self.history, resumed_at)

    def steps(self, first: int = 0) -> Iterator[int]:
        """The steps of the run from `first`; the clock starts with it."""
        self._first_step = first
        self._start_time = self._step_start_time = time.monotonic()
        yield from range(first, self.recipe.trainer.steps)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `time/<part>_s` of this step."""
        began = time.monotonic()
        yield
        key = f"time/{part}_s"
        self._current[key] = self._current.get(key, 0.0) + time.monotonic() - began

    def record(self, metrics: Mapping[str, Any]) -> None:
        self._current.update(metrics)

    def finish(self, step: int) -> None:
        """Closes a step: its line in metrics.jsonl, in trackers, and on the terminal."""
        now = time.monotonic()
        self.tokens += self._current.get("tokens/step", 0)
        # Rollouts that were not sampled in the background took as long as the learner waited.
        self._current.setdefault("time/rollout_s", self._current.get("time/rollout_wait_s", 0.0))
        row = {
            "step": step,
            **self._current,
            "time/step_s": now - self._step_start_time,
            "tokens/total": self.tokens,
        }
        self._pass_over(row)
        self._current, self._step_start_time = {}, now
        self.history.append(row)
        if self._trackers is None:  # not rank 0
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._trackers.log(row)
        self.say(self._line(row))

    def _pass_over(self, row: Row) -> None:
        """Has statistics of a user's loss that are no numbers be null: a mean over nothing is to end no run.

        What is learnt from was inspected. Any other metric, or one that a gate looks at, must be a number.
        Raises FinalError.
        """
        watched = {gate.metric for gate in self.gates}
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                if not key.startswith("loss/") or key in watched:
                    raise FinalError(f"step {row['step'] + 1}: the metric {key} is {value}")
                self.say(f"step {row['step'] + 1}: {key} is {value}, and logged as null")
                row[key] = None

    def check_gates(self, evaluated: bool) -> Exception | None:
        """Checks the gates after a step: prints warnings, returns the error that ends the run. Collective.

        evaluated: whether the step had an evaluation; then every metric has appeared, and a gate on an
        unknown one is an error.
        """
        failure: Exception | None = None
        if self.world.is_rank0:
            try:
                for warning in gates.check(self.gates, self.history):
                    self.say(warning)
                if evaluated and (unknown := gates.unknown(self.gates, self.history)):
                    failure = RecipeError(
                        f"{unknown}. What was learnt is saved: mend gates at --resume"
                    )
            except gates.GateStop as stop:
                failure = stop
        return self.world.broadcast_from_rank0(failure)

    def save_samples(self, label: str, samples: list[Sample], count: int = 16) -> None:
        """Keeps the first held-out responses, for the report: samples/<label>.json."""
        if self.world.is_rank0:
            rows = [asdict(s) for s in samples[:count]]
            write_json(self.folder / "samples" / f"{label}.json", rows)

    def summarise(self, before: float | None, after: float | None) -> None:
        if not self.world.is_rank0:
            return
        wall = sum(row["time/step_s"] for row in self.history)
        key = "mismatch/logprob_abs_mean"
        mismatch = [row[key] for row in self.history if key in row]
        last = self.history[-1] if self.history else {}
        summary = {
            "accuracy_before": before,
            "accuracy_after": after,
            "wall_s": wall,
            "shares": {
                part: sum(seconds(row, part) for row in self.history) / wall if wall else 0
                for part in PARTS
            },
            "skipped_total": last.get("fp16/skipped_total", 0),
            "mismatch_logprob_abs_mean": sum(mismatch) / len(mismatch) if mismatch else None,
            "steps": len(self.history),
            "tokens": self.tokens,
            "gates_broken": gates.judge(self.gates, self.history),
        }
        write_json(self.folder / "summary.json", summary)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Gives the trackers what they have not written, whatever ended the run."""
        if self._trackers is not None:
            self._trackers.close(failed=kind is not None)

    def _line(self, row: Row) -> str:
        steps = self.recipe.trainer.steps
        done = row["step"] + 1
        done_since_start = done - self._first_step  # or since the resume
        left = (time.monotonic() - self._start_time) / done_since_start * (steps - done)
        parts = [
            f"step {done}/{steps}",
            f"reward {row['reward/mean']:.3f}",
        ]
        if "mismatch/logprob_abs_mean" in row:
            parts.append(f"|dlogp| {row['mismatch/logprob_abs_mean']:.1e}")
        if row.get("eval/accuracy") is not None:
            parts.insert(2, f"held out {row['eval/accuracy']:.3f}")
        for fault in ("reward/errors", "reward/timeouts"):
            if row.get(fault):
                parts.append(f"{fault} {row[fault]}")
        if row.get("grad/norm") is not None:
            parts.append(f"grad {row['grad/norm']:.2f}")
        if "fp16/loss_scale" in row:
            parts.append(f"scale 2^{math.log2(row['fp16/loss_scale']):g}")
        if row.get("fp16/overflow_source"):
            parts.append(f"skipped: {row['fp16/overflow_source']}")
        times = " ".join(f"{part} {seconds(row, part):.2f}" for part in PARTS)
        parts.append(f"{row['time/step_s']:.2f} s ({times})")
        parts.append(f"{left / 60:.1f} min left")
        return " | ".join(parts)
