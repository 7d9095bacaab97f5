"""Where the training loop gets its samples from: servers (`rollouts`) or a recording (`recording`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, ScoredBatch
from megatron_fp16rl.rollout.weight_sync.base import Weights

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

        The samples that `finish` waited for, or else samples drawn now, from the weights published last.
        The replica's leader has the batch; other ranks may have None.
        """
        ...

    def begin(self, step: int) -> None:
        """Starts to sample a step in the background, from the weights published last; see `finish`.

        Until then nothing may be published or evaluated. No collective, and no wait.
        """
        ...

    def finish(self, version: int) -> None:
        """Waits for the samples that were begun, if any were. version: of the learner's weights, for
        servers that come back meanwhile.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes into `folder` the samples that wait for `collect`, if any do, for `restore`."""
        ...

    def restore(self, folder: Path, step: int) -> None:
        """Takes the samples of `step` from what `save` wrote, if it wrote any: `collect` returns them."""
        ...

    def rescore(self, batch: Batch) -> Batch | None:
        """The sequences of this replica's `batch` with mu_logprobs (at temperature 1) and experts of the
        servers' present weights: on the leader, on the host. None without servers.
        """
        ...

    def has_new_servers(self) -> bool:
        """Whether a server waits for weights: a new one, or one that was lost and came back."""
        ...

    def publish(self, weights: Weights, version: int) -> int:
        """Sends the weights to all servers, under `version`. Returns the bytes sent to each.

        weights: sent once more if a server fails in the middle.
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
