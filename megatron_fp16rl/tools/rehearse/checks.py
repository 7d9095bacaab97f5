"""What a rehearsal verifies. Each check returns a line for people, or raises Failed with what is wrong."""

from pathlib import Path
from typing import Any

import torch

from megatron_fp16rl.learner.checkpoint_files import Checkpoint, available
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.log import Row
from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.spec import family_of
from megatron_fp16rl.recipe import Recipe

# Mean |difference| of log-probs that rounding explains in models of this size, in nats.
LIMITS = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 3e-2}
_MOE = 15  # times as much: two experts with like scores may change places, which costs a token up to a nat


class Failed(RuntimeError):
    """A check of the rehearsal did not hold."""


def limit_of(recipe: Recipe) -> float:
    """How far log-probs of two engines may differ on average, in nats."""
    limit = max(LIMITS[dtype] for dtype in (recipe.precision.dtype, recipe.precision.served))
    has_experts = hasattr(model_config(recipe.model), "moe_intermediate_size")
    return limit * (_MOE if has_experts else 1)


def read_steps(run: Path) -> list[Row]:
    """The steps that a run has recorded so far."""
    log = metrics.read(run)
    if log.faults:
        raise Failed("; ".join(log.faults))
    return log.rows


def steps(rows: list[Row], servers: int, limit: float) -> str:
    """Steps learnt something, sampled from all servers, and published what they learnt.

    Learner and servers must agree on log-probs, of the samples and after each sync.
    """
    changed = [row for row in rows if row["updates"]]
    if not any(row["grad/norm"] for row in changed):
        raise Failed("no step had a gradient: rewards gave no signal, or every update was skipped")
    if short := [row["step"] for row in rows if row["rollout/servers"] != servers]:
        raise Failed(f"steps {short} did not sample from all {servers} servers")
    expected = changed[0].get("sync/version")  # not 1 where the run was resumed
    for row in changed:
        step, version = row["step"], row.get("sync/version")
        if version is None or version != expected:
            raise Failed(
                f"step {step} changed the weights; servers have version {version}, not {expected}"
            )
        expected = version + 1
        # Two engines never agree on every bit: 0.0 would be a mean over no tokens.
        if not row.get("sync/verified_logprob_abs_mean"):
            raise Failed(f"step {step} changed the weights; those of the servers were not verified")
    sampled = max(row["mismatch/logprob_abs_mean"] for row in rows)
    synced = max(row["sync/verified_logprob_abs_mean"] for row in changed)
    if not max(sampled, synced) <= limit:
        raise Failed(
            f"log-probs of learner and servers differ by {sampled:.3g} nats on average in the samples, "
            f"{synced:.3g} after a sync; rounding explains {limit:g}"
        )
    return (
        f"{sum(row['updates'] for row in changed)} updates, mean |dlogp| {sampled:.1e}; "
        f"{len(changed)} syncs verified, |dlogp| <= {synced:.1e}"
    )


def checkpoint_at(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, every file as its manifest says."""
    checkpoint = next((c for c in available(run / "checkpoints") if c.step == step), None)
    if checkpoint is None:
        raise Failed(f"{run / 'checkpoints'} has no checkpoint at step {step}")
    if faults := checkpoint.faults(checkpoint.files()):
        raise Failed(f"the checkpoint is damaged: {'; '.join(faults[:3])}")
    return checkpoint


def parity(
    samples: list[dict[str, Any]], export: Path, imported: Path, temperature: float, limit: float
) -> str:
    """transformers in fp32 gives the exported model's log-probs as the servers gave them.

    samples: of servers, with their log-probs. imported: the model before training, which must be farther
    from them, else the export may be the same model.
    """
    served = [
        logprob
        for sample in samples
        for logprob, sampled in zip(sample["logprobs"], _mask(sample), strict=True)
        if sampled
    ]
    if not served:
        raise Failed(f"there are no samples to compare {export} with")
    scored, before = (_logprobs(folder, samples, temperature) for folder in (export, imported))
    mean = _mean_difference(scored, served)
    if not mean <= limit:
        raise Failed(
            f"{export}: transformers' log-probs differ from the servers' by {mean:.3g} nats on average; "
            f"rounding explains {limit:g}"
        )
    moved = _mean_difference(before, served)
    if moved <= 2 * mean:
        raise Failed(
            f"{export}: transformers' log-probs differ from the servers' by {mean:.3g} nats on average, and "
            f"those of the model before training by {moved:.3g}: the export may be that model"
        )
    return f"|dlogp| {mean:.1e} over {len(served)} tokens; before training {moved:.2g}"


def _mask(sample: dict[str, Any]) -> list[bool]:
    """Which of a response's tokens a server sampled: all, but for what an environment said."""
    return sample.get("mask") or [True] * len(sample["ids"])


def _mean_difference(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _logprobs(folder: Path, samples: list[dict[str, Any]], temperature: float) -> list[float]:
    """Log-probs in nats of all response tokens, by transformers in fp32.

    Raises Failed where a tensor's name or shape is not the model's.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    if faults := [f"{what}: {sorted(names)[:3]}" for what, names in report.items() if names]:
        raise Failed(f"transformers does not load {folder} as it is: {'; '.join(faults)}")
    family_of(model.config).as_served(model)
    scored: list[float] = []
    with torch.no_grad():
        for sample in samples:
            prompt, response = sample["prompt"]["ids"], sample["ids"]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
            scored += own[torch.tensor(_mask(sample))].tolist()
    return scored
