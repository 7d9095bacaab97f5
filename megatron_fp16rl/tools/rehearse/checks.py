"""What a rehearsal holds against what; each returns figures, and raises Failed where something is wrong."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.learner.checkpoint_files import Checkpoint, available
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import METRICS
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.recipe import TORCH_DTYPES, Gate, Recipe
from megatron_fp16rl.utils.files import read_json, read_json_lines

# Mean |difference| of log-probs that rounding explains in models of a rehearsal's size, in nats.
LIMITS = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 3e-2}
# Two experts with like scores may change places, which costs a token up to a nat. Few tokens: they are
# left out of a mean over tokens; where only a mean is known, it may be so many times higher.
_CHANGED, _CHANGED_MEAN = 0.1, 15
_RESAMPLED = 32  # samples, at most
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


def rows(run: Path) -> list[metrics.Row]:
    """The steps that a run has recorded. Raises Failed if there is anything else."""
    found = metrics.read(run)
    if found.faults:
        raise Failed("; ".join(found.faults))
    return found.rows


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


def sync(steps: list[dict[str, object]], allowed: Tolerance) -> str:
    """Says how many syncs were verified, and the largest mean |dlogp| between learner and servers.

    Every step that changed the weights must have published them as its own version, and verified it.
    """
    changed = [row for row in steps if row["updates"]]
    for row in changed:
        step, version = row["step"], row.get("sync/version")
        if version != step + 1:
            raise Failed(
                f"step {step} changed the weights, but servers have version {version}, not {step + 1}"
            )
        # Not even equal engines agree on every bit of every log-prob: 0.0 is a mean over none.
        if not row.get("sync/verified_logprob_abs_mean"):
            raise Failed(f"step {step} changed the weights, but no server's were verified")
    if not changed:
        raise Failed("no step changed the weights: there was no sync to verify")
    worst = max(row["sync/verified_logprob_abs_mean"] for row in changed)
    if not worst <= allowed.mean:
        raise Failed(
            f"after a sync the servers' log-probs differ from the learner's by {worst:.3g} nats on "
            f"average; rounding explains {allowed.mean:g}"
        )
    return f"{len(changed)} of {len(steps)} steps, |dlogp| <= {worst:.1e}"


def sampled(steps: list[dict[str, object]], servers: int, allowed: Tolerance) -> str:
    """Says how far the samples' log-probs are from the learner's, and how often routers agree."""
    if lost := [row["step"] for row in steps if row["rollout/servers"] != servers]:
        raise Failed(f"steps {lost} sampled from other than {servers} servers")
    worst = max(row["mismatch/logprob_abs_mean"] for row in steps)
    if not worst <= allowed.mean:
        raise Failed(
            f"the samples' log-probs differ from the learner's by {worst:.3g} nats on average; "
            f"rounding explains {allowed.mean:g}"
        )
    said = f"mean |dlogp| {worst:.1e}"
    if "mismatch/router_agreement" in steps[0]:
        least = min(row["mismatch/router_agreement"] for row in steps)
        said += f", routers agree on {100 * least:.1f} %"
    return said


def gates(steps: list[dict[str, object]], asked: Sequence[Gate]) -> str:
    """Says of how many gates the metric is there. A gate on one that is not would never ring."""
    seen = {k for row in steps for k, v in row.items() if isinstance(v, int | float)}
    if absent := [gate.metric for gate in asked if gate.metric not in seen]:
        raise Failed(f"gates: {', '.join(absent)} had no number in {len(steps)} steps")
    return f"{len(asked)} of {len(asked)} metrics are there; bounds are not judged"


def checkpoint(run: Path, step: int) -> Checkpoint:
    """The checkpoint at a step, every file as its manifest says."""
    found = next((c for c in available(run / "checkpoints") if c.step == step), None)
    if found is None:
        raise Failed(f"{run / 'checkpoints'} has no checkpoint at step {step}")
    if faults := found.faults(found.files()):
        raise Failed(f"the checkpoint is damaged: {'; '.join(faults[:3])}")
    return found


def ranks(found: Checkpoint) -> int:
    """How many ranks wrote a checkpoint: each keeps its random numbers."""
    return len(list((found.path / "rng").glob("rank_*.safetensors")))


def export(folder: Path, like: Path, again: Path, dtype: str) -> tuple[int, int]:
    """Names and shapes are those of `like`, values those of `again`: (tensors, bytes).

    like: what transformers wrote; again: the last checkpoint, read on one rank; dtype: of matrices.
    """
    ours, theirs, converted = HFFolder(folder), HFFolder(like), HFFolder(again)
    for other, whose in ((theirs, "transformers' own"), (converted, "the last checkpoint's")):
        if difference := set(ours.names()) ^ set(other.names()):
            raise Failed(f"{folder}: names differ from {whose}: {sorted(difference)[:5]}")
    size = 0
    for name in ours.names():
        tensor, other = ours.read(name), converted.read(name)
        if tensor.shape != theirs.read(name).shape:
            raise Failed(f"{folder}: {name} is {tuple(tensor.shape)}, not as transformers has it")
        if tensor.ndim > 1 and str(tensor.dtype) != f"torch.{TORCH_DTYPES[dtype]}":
            raise Failed(f"{folder}: {name} is {tensor.dtype}, the recipe's precision is {dtype}")
        if not tensor.isfinite().all():
            raise Failed(f"{folder}: {name} is not finite")
        if tensor.dtype != other.dtype or not tensor.equal(other):
            raise Failed(f"{folder}: {name} is not what the last checkpoint holds")
        size += tensor.nbytes
    return len(ours.names()), size


@dataclass(frozen=True)
class Parity:
    """Log-probs by transformers in fp32 against those that servers gave their samples, in nats.

    mean, most   |difference|, the mean without the tokens that a tolerance leaves out
    moved        mean |difference| to the model before training
    """

    mean: float
    most: float
    moved: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"|dlogp| {self.mean:.1e} on average, {self.most:.1e} at most, over {self.tokens} tokens; "
            f"training moved them by {self.moved:.2g}"
        )


def parity(run: Path, like: Path, temperature: float, allowed: Tolerance, version: int) -> Parity:
    """Holds the export against the samples of the last evaluation; raises Failed as `_parity`.

    like: the model before training; version: of the weights that they must be sampled from.
    """
    samples = read_json(run / "samples" / "after.json", list)
    return _parity(samples, run / "export", like, temperature, allowed, version)


def resampled(
    run: Path, step: int, weights: Path, like: Path, temperature: float, allowed: Tolerance
) -> Parity:
    """Holds a checkpoint's weights, as a Hugging Face folder, against what the step after it sampled."""
    version = state_of(checkpoint(run, step))["progress"]["version"]
    files = sorted((run / "rollouts").glob(f"step_{step:05}.leader_*.jsonl"))
    samples = [row for file in files for row in read_json_lines(file)]
    return _parity(samples[:_RESAMPLED], weights, like, temperature, allowed, version)


def _parity(
    samples: list[dict],
    folder: Path,
    like: Path,
    temperature: float,
    allowed: Tolerance,
    version: int,
) -> Parity:
    """Raises Failed if log-probs differ by more than `allowed`, or training has not moved them by more."""
    if wrong := {sample["version"] for sample in samples} - {version}:
        raise Failed(f"samples are from weights of version {sorted(wrong)}, not {version}")
    served = [lp for sample in samples for lp in sample["logprobs"]]
    if not served:
        raise Failed(f"there are no samples to hold {folder} against")
    found = _logprobs(folder, samples, temperature)
    apart = sorted(abs(a - b) for a, b in zip(found, served, strict=True))
    counted = apart[: math.ceil((1 - allowed.left_out) * len(apart))]
    mean, most = sum(counted) / len(counted), allowed.tokens
    if not mean <= most:
        raise Failed(
            f"{folder}: transformers' log-probs differ from the servers' by {mean:.3g} nats on "
            f"average ({apart[-1]:.3g} at most); rounding explains {most:g}"
        )
    before = _logprobs(like, samples, temperature)
    moved = sum(abs(a - b) for a, b in zip(found, before, strict=True)) / len(before)
    if moved <= most:
        raise Failed(
            f"{folder}: training moved log-probs by {moved:.3g} nats only, and rounding explains "
            f"{most:g}: it is not proved that they are not those of the import"
        )
    return Parity(mean, apart[-1], moved, len(apart))


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


def state_of(found: Checkpoint) -> dict:
    """What of a checkpoint is not a tensor."""
    return read_json(found.path / _STATE)
