"""What the updates of a step did, and their metrics."""

from dataclasses import dataclass

from megatron_fp16rl.data.batch import TrainBatch
from megatron_fp16rl.learner.loss_scale import LossScaler
from megatron_fp16rl.learner.optimizer import UpdateOutcome

# Metrics that are means over response tokens, by the name of the sum in the loss's statistics; those of a
# user's loss are loss/NAME
_TOKEN_MEANS = {
    "clipped": "loss/clip_fraction",
    "kl": "loss/kl",
    "corrected": "correction/fraction",
    "weight": "correction/weight_mean",
}


@dataclass(frozen=True)
class Outcome:
    """What the updates on one rollout batch did."""

    stepped: bool  # at least one update was not skipped: the weights changed
    metrics: dict[str, float | str | None]
    # The sequences of the first update with the learner's log-probs before it: on the last pipeline stage,
    # if the batch was not scored.
    first_update: TrainBatch | None = None


def summarise(
    outcomes: list[UpdateOutcome],
    losses: list[float],
    sums: dict[str, float],
    scaler: LossScaler | None,
) -> Outcome:
    """One outcome of a step's updates: means over those that were made, the source of the last that was not.

    sums: over the step's response tokens, with their number as "tokens"; the tokens of all sequences as
    "sequence_tokens", and with padding, as the model runs them, as "run_tokens".
    """
    good = [outcome for outcome in outcomes if outcome.stepped]
    skipped = [outcome for outcome in outcomes if not outcome.stepped]
    token_means = {
        _TOKEN_MEANS.get(name, f"loss/{name}"): value / sums["tokens"]
        for name, value in sums.items()
        if name not in ("tokens", "sequence_tokens", "run_tokens")
    }
    norms = [o.grad_norm for o in good if o.grad_norm is not None]
    metrics: dict[str, float | str | None] = {
        "loss/policy": sum(losses) / len(losses),
        **token_means,
        "tokens/padding_fraction": 1 - sums["sequence_tokens"] / sums["run_tokens"],
        "grad/norm": sum(norms) / len(norms) if norms else None,
        "lr": good[-1].lr if good else None,
        "updates": len(good),
        "fp16/overflow_source": skipped[-1].overflow_source if skipped else None,
    }
    if scaler is not None:
        underflow = [o.underflow_fraction for o in good if o.underflow_fraction is not None]
        metrics |= {
            "fp16/loss_scale": scaler.scale.item(),
            "fp16/grad_underflow_fraction": sum(underflow) / len(underflow) if underflow else None,
            "fp16/skipped_total": scaler.skipped_total,
            "fp16/skipped_in_a_row": scaler.skipped_in_a_row,
        }
    return Outcome(stepped=bool(good), metrics=metrics)
