"""Where the training loop gets its samples from: servers (`rollouts`) or a recording (`recording`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, ScoredBatch
from megatron_fp16rl.rollout.weight_sync.base import Export

Metrics = dict[str, float | int | None]
Score = Callable[[Batch, float], ScoredBatch]  # as Learner.score: (batch, temperature)


@dataclass(frozen=True)
class Evaluation:
    """One response to each held-out prompt.

    accuracy: the mean reward, on every rank; None without prompts or servers. samples: on rank 0 only.
    metrics: to be logged with the step.
    """

    accuracy: float | None = None
    samples: list[Sample] = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)


class RolloutSource(Protocol):
    """What the training loop needs. Every method is collective over the learner's ranks."""

    def collect(self, step: int) -> tuple[Batch | None, Metrics]:
        """A step's samples of this model replica, on the host, and metrics of all replicas.

        The replica's leader has the batch; other ranks may have None.
        """
        ...

    def has_new_servers(self) -> bool:
        """Whether a server waits for weights: a new one, or one that was lost and came back."""
        ...

    def publish(self, export: Export, version: int) -> int:
        """Sends the weights to all servers, under `version`. Returns the bytes sent to each.

        export: Learner.export. It is called again if a server fails in the middle.
        """
        ...

    def verify(self, score: Score) -> float | None:
        """Compares the servers' log-probs of fixed sequences with the learner's.

        Returns the mean |difference| in nats of the worst server; None without servers.
        """
        ...

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        """Samples and grades one response to each prompt."""
        ...

    def evaluate_suites(self) -> Metrics:
        """Metrics of the recipe's `trainer.suites`."""
        ...
