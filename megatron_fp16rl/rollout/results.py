"""What the loop gets from rollouts besides a batch."""

from dataclasses import dataclass, field

from megatron_fp16rl.data.batch import Sample

Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class Evaluation:
    """One response to each held-out prompt.

    accuracy: the mean reward, on every rank; None without prompts or servers. samples: on rank 0 only.
    metrics: to be logged with the step.
    """

    accuracy: float | None = None
    samples: list[Sample] = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)
