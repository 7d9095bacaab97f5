"""What a rehearsal holds against what; each returns figures, and raises Failed where something is wrong."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.checkpoints import Checkpoint, available
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.run import METRICS
from megatron_fp16rl.weights.folder import HFFolder

# Mean |difference| of log-probs that rounding explains in models of a rehearsal's size, in nats.
LIMITS = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 3e-2}
# Two experts with like scores may change places, which costs a token up to a nat. Few tokens: they are
# left out of a mean over tokens; where only a mean is known, it may be so many times higher.
_CHANGED, _CHANGED_MEAN = 0.1, 15
_STATE = "state.json"  # of a checkpoint; see learner/checkpoint.py


class Failed(RuntimeError):
    """Something that a rehearsal is to prove does not hold."""


@dataclass(frozen=True)
class Tolerance:
    """How far apart the log-probs of two engines may be, in nats: of tokens, and of a mean."""

    tokens: float
    mean: float
    left_out: float = 0.0  # share of the tokens, the worst

    @classmethod
    def of(cls, recipe: Recipe, config: dict[str, object]) -> "Tolerance":
        """config: the small model's."""
        most = max(LIMITS[d] for d in (recipe.precision.dtype, recipe.precision.served))
        if any(config.get(name) for name in ("num_experts", "n_routed_experts")):
            return cls(most, _CHANGED_MEAN * most, _CHANGED)
        return cls(most, most)


def rows(run: Path) -> list[dict[str, object]]:
    """The steps that a run has recorded."""
    file = run / METRICS
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # the last may be half written


def steps(run: Path, count: int) -> list[dict[str, object]]:
    """Steps 0 to `count` - 1, each recorded once, in order; raises Failed otherwise."""
    found = rows(run)
    numbers = [row["step"] for row in found]
    if numbers != list(range(count)):
        raise Failed(f"{run / METRICS} has the steps {numbers}, not 0 to {count - 1} once each")
    return found


def learnt(steps: list[dict[str, object]]) -> str:
    """Says what the steps did. Raises Failed if they changed nothing."""
    norms = [row["grad/norm"] for row in steps if row["grad/norm"]]
    if not norms:
        raise Failed("no step had a gradient: rewards gave no signal, or every update was skipped")
    updates = sum(row["updates"] for row in steps)
    said = f"{updates} updates, gradient norm up to {max(norms):.2g}"
    if skipped := steps[-1].get("fp16/skipped_total"):
        said += f", {skipped:.0f} skipped for an overflow"
    return said


def sync(steps: list[dict[str, object]], allowed: Tolerance) -> float:
    """The largest mean |dlogp| between learner and servers after a sync, in nats."""
    worst = max(row.get("sync/verified_logprob_abs_mean", 0.0) for row in steps)
    if worst > allowed.mean:
        raise Failed(
            f"after a sync the servers' log-probs differ from the learner's by {worst:.3g} nats on "
            f"average; rounding explains {allowed.mean:g}"
        )
    return worst


def checkpoint(run: Path, step: int) -> Checkpoint:
    """The checkpoint at a step, every file as it was written."""
    found = next((c for c in available(run / "checkpoints") if c.step == step), None)
    if found is None:
        raise Failed(f"{run / 'checkpoints'} has no checkpoint at step {step}")
    if faults := found.faults(found.files()):
        raise Failed(f"the checkpoint is damaged: {'; '.join(faults[:3])}")
    return found


def resumed(run: Path, before: int) -> str:
    """Holds the last checkpoint against the one at step `before`; says what went on where it stood."""
    last = steps(run, before + 1)[-1]
    old, new = (_state(checkpoint(run, step)) for step in (before, before + 1))
    made = last["updates"]
    expected = old["schedule"]["updates"] + made
    counts = {"the schedule": new["schedule"]["updates"], **new["adam_steps"]}
    if wrong := {name: count for name, count in counts.items() if count != expected}:
        raise Failed(f"{made} updates after the checkpoint should make {expected}, not {wrong}")
    if new["progress"]["tokens"] <= old["progress"]["tokens"]:
        raise Failed("the count of tokens did not go on")
    said = f"updates {old['schedule']['updates']} -> {new['schedule']['updates']}"
    if new["scaler"] is not None:
        said += f", loss scale {_scale(old):g} -> {_scale(new):g}"
        _check_scaler(old["scaler"], new["scaler"], made)
    return said


def _check_scaler(old: dict, new: dict, made: int) -> None:
    ratio = new["scale"] / old["scale"]
    skipped = new["skipped_total"] - old["skipped_total"]
    if not 2.0**-skipped <= ratio <= 2.0**made:
        raise Failed(f"the loss scale was {old['scale']:g}, and is {new['scale']:g} a step later")


def export(folder: Path, like: Path, again: Path) -> tuple[int, int]:
    """Names and shapes are those of `like`, values those of `again`: (tensors, bytes).

    like: what transformers wrote; again: the last checkpoint, read on one rank.
    """
    ours, theirs, converted = HFFolder(folder), HFFolder(like), HFFolder(again)
    if difference := set(ours.names()) ^ set(theirs.names()):
        raise Failed(f"{folder}: names differ from transformers' own: {sorted(difference)[:5]}")
    size = 0
    for name in ours.names():
        tensor, other = ours.read(name), converted.read(name)
        if tensor.shape != theirs.read(name).shape:
            raise Failed(f"{folder}: {name} is {tuple(tensor.shape)}, not as transformers has it")
        if not tensor.isfinite().all():
            raise Failed(f"{folder}: {name} is not finite")
        if tensor.dtype != other.dtype or not tensor.equal(other):
            raise Failed(f"{folder}: {name} is not what the last checkpoint holds")
        size += tensor.nbytes
    return len(ours.names()), size


def parity(
    run: Path, like: Path, temperature: float, allowed: Tolerance
) -> tuple[float, float, float, int]:
    """Holds the export, read by transformers in fp32, against what the servers said of their samples.

    Returns mean and largest |difference| in nats, the mean difference to the model before training,
    and the number of tokens. Raises Failed if it is more than `allowed`, or if the model has not moved
    by more.
    """
    samples = json.loads((run / "samples" / "after.json").read_text())
    served = [lp for sample in samples for lp in sample["logprobs"]]
    exported = _logprobs(run / "export", samples, temperature)
    apart = sorted(abs(a - b) for a, b in zip(exported, served, strict=True))
    counted = apart[: math.ceil((1 - allowed.left_out) * len(apart))]
    mean, most = sum(counted) / len(counted), allowed.tokens
    if not mean <= most:
        raise Failed(
            f"{run / 'export'}: transformers' log-probs differ from the servers' by {mean:.3g} nats on "
            f"average ({apart[-1]:.3g} at most); rounding explains {most:g}"
        )
    before = _logprobs(like, samples, temperature)
    moved = sum(abs(a - b) for a, b in zip(exported, before, strict=True)) / len(before)
    if moved <= most:
        raise Failed(f"training moved log-probs by {moved:.3g} nats only: it proves no sync")
    return mean, apart[-1], moved, len(apart)


def _logprobs(folder: Path, samples: list[dict], temperature: float) -> list[float]:
    """Log-probs of all response tokens, by transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if wrong := [f"{what}: {sorted(names)[:3]}" for what, names in report.items() if names]:
        raise Failed(f"transformers does not load {folder} as it is: {'; '.join(wrong)}")
    found: list[float] = []
    with torch.no_grad():
        for sample in samples:
            prompt, response = sample["prompt"]["ids"], sample["ids"]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
            found += logprobs.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
    return found


def _state(found: Checkpoint) -> dict:
    return json.loads((found.path / _STATE).read_text())


def _scale(state: dict) -> float:
    return state["scaler"]["scale"]
