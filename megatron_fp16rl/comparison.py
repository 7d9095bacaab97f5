"""When a run compares its two engines, and on what: mismatch/*, staleness/* and the learner's own noise."""

from megatron_fp16rl.data.batch import Batch, ScoredBatch, TrainBatch
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.learner.outcome import Outcome
from megatron_fp16rl.metrics import mismatch, staleness
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.source import Metrics

COMPARE_EVERY, _RESCORED = 10, 8  # steps; sequences of a replica


class Comparison:
    """What both engines say of the same tokens. Every method is collective over the world."""

    def __init__(self, recipe: Recipe, learner: Learner) -> None:
        self.algorithm, self.learner = recipe.algorithm, learner
        self.on_policy = not recipe.rollout.ahead

    def scores(self, step: int) -> bool:
        """Whether the learner scores a step's batch before the update.

        On policy mismatch/* of other steps comes from the first update's own forward pass, for free.
        """
        return self.algorithm.needs_scores or (self.on_policy and step % COMPARE_EVERY == 0)

    def before_update(self, batch: TrainBatch, step: int) -> Metrics:
        """mismatch/* on policy: the servers sampled with the learner's weights, so all that makes log-probs
        differ is what the two engines round differently.
        """
        if not self.on_policy or batch.pi_logprobs is None:
            return {}
        metrics = self._mismatch(batch)
        if step % COMPARE_EVERY == 0:
            metrics["mismatch/learner_noise"] = noise(self.learner, batch, self.learner.temperature)
        return metrics

    def after_update(self, batch: TrainBatch, outcome: Outcome, version: int) -> Metrics:
        """What only the first update's forward pass tells, where the batch was not scored.

        Of a batch that older weights sampled, staleness/*; see metrics/staleness.py.
        """
        scored = outcome.first_update if batch.pi_logprobs is None else batch
        if not self.on_policy:
            group = self.learner.world.data.group
            ages = staleness.versions(batch, version, group)
            return {**ages, **self._on_last_stage(scored, "staleness")}
        return self._on_last_stage(scored, "mismatch") if batch.pi_logprobs is None else {}

    def few(self, batch: TrainBatch) -> TrainBatch:
        """Sequences of a step for the servers to score again."""
        multiple = self.learner.world.layout.sequences_multiple
        count = min(max(_RESCORED // multiple, 1) * multiple, len(batch))
        stride = len(batch) // count
        return batch.rows(range(0, stride * count, stride))

    def of_rescored(self, rescored: Batch) -> Metrics:
        """mismatch/* on sequences that the servers scored with the weights published now."""
        if self.learner.router_replay:
            self.learner.router_replay.agreement()  # drops the counts of batches of older weights
        scored = self.learner.score(rescored, temperature=1.0)
        return {
            **self._mismatch(scored),
            "mismatch/learner_noise": noise(self.learner, scored, 1.0),
        }

    def _on_last_stage(self, scored: ScoredBatch | None, name: str) -> Metrics:
        """Of sequences with log-probs on the last pipeline stage alone; None elsewhere."""
        world = self.learner.world
        metrics: Metrics = {}
        if scored is not None:
            compared = mismatch.compare(scored, world.data.group, self._clip)
            metrics = {f"{name}/{key}": value for key, value in compared.items()}
        return world.broadcast_from_last_stage(metrics)

    def _mismatch(self, scored: ScoredBatch) -> Metrics:
        metrics: Metrics = {**mismatch.measure(scored, self.learner.world.data.group, self._clip)}
        if self.learner.router_replay:
            metrics["mismatch/router_agreement"] = self.learner.router_replay.agreement()
        return metrics

    @property
    def _clip(self) -> mismatch.Clip:
        """The range outside which PPO would stop a token."""
        return mismatch.Clip(
            self.algorithm.clip_low, self.algorithm.clip_high, self.algorithm.loss == "gspo"
        )


def noise(learner: Learner, scored: ScoredBatch, temperature: float) -> float | None:
    """Mean |log pi - log pi| of a batch scored twice, the second time in micro-batches of other sequences.

    What the learner rounds differently from itself. None where a half has too few sequences. Collective over
    the world.
    """
    again = learner.score_in_other_company(scored, temperature)
    if learner.router_replay:
        learner.router_replay.agreement()  # drops the counts: the same tokens a second time
    if again is None:
        return None
    itself = scored.replace(mu_logprobs=again)
    return mismatch.compare(itself, learner.world.data.group)["logprob_abs_mean"]
