"""Records samples on disk, and replays them without servers.

rollouts/step_00007.leader_1.jsonl holds the samples that data-parallel rank 1 collected in step 7, one a
line. The same samples make the same updates: to debug a step, to compare two learners, or a resumed run
with one that was never stopped.
"""

import base64
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, compact
from megatron_fp16rl.parallel import Axis, World
from megatron_fp16rl.recipe import Recipe, RecipeError, Rollout
from megatron_fp16rl.rollout.source import Evaluation, Metrics, Score
from megatron_fp16rl.rollout.weight_sync.base import Weights
from megatron_fp16rl.utils.files import read_json_lines, write_json_lines


def write_samples(folder: Path, step: int, leader: int, samples: list[Sample]) -> None:
    """Writes what one data-parallel rank collected in a step."""
    rows = [
        {**asdict(replace(sample, experts=None)), "experts": encoded(sample.experts)}
        for sample in samples
    ]
    write_json_lines(folder / f"step_{step:05}.leader_{leader}.jsonl", rows)


def encoded(experts: torch.Tensor | None) -> dict[str, Any] | None:
    """A record of experts for JSON: as digits it would be three times as large, and slow to read."""
    if experts is None:
        return None
    data = base64.b64encode(experts.numpy().tobytes()).decode()
    return {"dtype": str(experts.numpy().dtype), "shape": list(experts.shape), "base64": data}


def decoded(record: dict[str, Any] | None) -> torch.Tensor | None:
    """What `encoded` made a record of. Raises ValueError for another, KeyError if something is missing."""
    if record is None:
        return None
    dtype = {"uint8": np.uint8, "int16": np.int16}[record["dtype"]]
    flat = np.frombuffer(base64.b64decode(record["base64"], validate=True), dtype)
    return torch.from_numpy(flat.reshape(record["shape"]).copy())


def set_aside(folder: Path, step: int) -> None:
    """Moves samples of `step` and later into undone/: a resumed run samples these steps again.

    At another number of leaders it would not overwrite all files of a step.
    """
    for file in folder.glob("step_*.leader_*.jsonl"):
        if int(file.name.split(".")[0].removeprefix("step_")) >= step:
            (folder / "undone").mkdir(exist_ok=True)
            file.replace(folder / "undone" / file.name)


def local_samples(folder: Path, step: int, settings: Rollout, data: Axis) -> list[Sample]:
    """A data-parallel rank's samples of a step, at whatever layout they were recorded. Raises RecipeError."""
    share = settings.prompts // data.size
    first = share * data.rank
    local = [s for s in read_samples(folder, step) if first <= s.group < first + share]
    if len(local) != share * settings.samples:
        raise RecipeError(
            f"{folder} has {len(local)} samples for this rank in step {step}, but "
            f"rollout.prompts and rollout.samples ask for {share * settings.samples}"
        )
    return local


def read_samples(folder: Path, step: int) -> list[Sample]:
    """All samples of a step, by prompt. Raises RecipeError if there are none, Unreadable for bad JSON."""
    files = sorted(folder.glob(f"step_{step:05}.leader_*.jsonl"))
    if not files:
        raise RecipeError(f"{folder} holds no recorded samples of step {step}")
    rows = [row for file in files for row in read_json_lines(file)]
    try:
        samples = _samples(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{files[0]} holds no samples of ours: {error}") from None
    return sorted(samples, key=lambda sample: sample.group)


def _samples(rows: list[dict[str, Any]]) -> list[Sample]:
    records = [row.get("experts") for row in rows]
    if any(isinstance(record, list) for record in records):  # recorded by an earlier version
        digits = [torch.tensor(record, dtype=torch.int32) for record in records]
        # It does not say how many experts there are; all samples of a step must have one dtype.
        count = 1 + max(int(experts.max()) for experts in digits)
        experts: list[torch.Tensor | None] = [compact(one, count) for one in digits]
    else:
        experts = [decoded(record) for record in records]
    return [
        Sample(**{**row, "prompt": Prompt(**row["prompt"]), "experts": one})
        for row, one in zip(rows, experts, strict=True)
    ]


class Replay:
    """A RolloutSource of recorded samples. Nothing is served, so there is no held-out accuracy."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        assert recipe.rollout.replay is not None
        self.settings, self.world = recipe.rollout, world
        self.folder = Path(recipe.rollout.replay)

    def collect(self, step: int) -> tuple[Batch, Metrics]:
        """See RolloutSource. On every rank: all read the same files, at whatever layout these were
        recorded. The rewards are recorded too: nothing is graded, and there are no metrics.
        """
        settings = self.settings
        batch = Batch.from_samples(local_samples(self.folder, step, settings, self.world.data))
        if settings.router_replay and batch.experts is None:
            raise RecipeError(
                f"rollout.replay={self.folder} was recorded without experts; set "
                "rollout.router_replay: false, or record again with it"
            )
        return batch, {}

    def begin(self, step: int) -> None:
        """Nothing is sampled."""

    def finish(self, version: int) -> None:
        """Nothing is sampled."""

    def save(self, folder: Path) -> None:
        """The recording is what there is to save."""

    def restore(self, folder: Path, step: int) -> None:
        """Goes on with the recording."""

    def rescore(self, batch: Batch) -> None:
        """Nothing is served."""

    def has_new_servers(self) -> bool:
        return False

    def publish(self, weights: Weights, version: int) -> int:
        """Gathers the weights, as for servers, and drops them. Returns their bytes."""
        return self.world.broadcast_from_rank0(sum(tensor.nbytes for _, tensor in weights.whole()))

    def verify(self, score: Score) -> None:
        """Nothing is served."""

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        return Evaluation(metrics={"eval/accuracy": None})

    def evaluate_suites(self) -> Metrics:
        return {}
