"""Memory of the learner's ranks: what a stage holds, times what its pipeline keeps in flight."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.lengths import longest, micro_batch, micro_batches
from megatron_fp16rl.tools.plan.proof import Proof, prove
from megatron_fp16rl.tools.plan.stage import Stage, State, build

GIB = 2**30


@dataclass(frozen=True)
class RankMemory(State):
    """Of each rank of a pipeline stage, in bytes.

    in_flight     micro-batches (of one model chunk) whose activations are kept at once
    activations   kept for the backward passes of these
    transient     more than that, at the worst moment of one micro-batch: a layer that is recomputed,
                  gradients of activations
    logits        more than the activations while the last stage makes log-probs: logits, their gradient
    batch         tokens, masks and log-probs of its share of a step, as sampled, as dealt out for the
                  updates, and as one update has them; records of experts are on the host
    sync          on rank 0 while weights are sent: a bucket, and the largest tensor as it is gathered
    """

    stage: int
    ranks: tuple[int, int]
    in_flight: int
    activations: int
    transient: int
    logits: int
    batch: int
    sync: int

    @property
    def training(self) -> int:
        """At the worst moment of an update, beside what is always there."""
        return self.activations + max(self.transient, self.logits)

    @property
    def peak(self) -> int:
        return self.static + max(self.batch + self.training, self.sync)


@dataclass(frozen=True)
class LearnerMemory:
    """Of all ranks, and the proof that together they hold the model."""

    ranks: list[RankMemory]
    proof: Proof

    @property
    def worst(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)


def learner_memory(
    recipe: Recipe, config: object, progress: Callable[[str], None] = lambda line: None
) -> LearnerMemory:
    """Builds one rank of each pipeline stage, and runs a micro-batch through it.

    config: the model's transformers configuration. Raises RecipeError, and what Megatron refuses with.
    """
    count = recipe.learner.pipeline_parallel
    batch = micro_batch(recipe)
    stages = []
    for stage in range(count):
        progress(f"stage {stage + 1} of {count}: building, {batch.rows} x {batch.seq} tokens")
        stages.append(build(recipe, config, stage, batch))
    progress("holding the ranks' tensors against transformers")
    proof = prove((tensors for stage in stages for tensors in stage.exported), config)
    return LearnerMemory([_of_stage(recipe, stage) for stage in stages], proof)


def _of_stage(recipe: Recipe, stage: Stage) -> RankMemory:
    layout = recipe.learner
    kept = in_flight(
        layout.pipeline_parallel, layout.model_chunks, stage.stage, micro_batches(recipe)
    )
    activations = sum(stage.runs[chunk].held for chunk in kept)
    width = layout.ranks // layout.pipeline_parallel
    return RankMemory(
        **asdict(stage.state),
        stage=stage.stage,
        ranks=(stage.rank, stage.rank + width - 1),
        in_flight=len(kept),
        activations=activations,
        transient=max(max(0, run.peak - run.held) for run in stage.runs),
        logits=max(run.logits for run in stage.runs),
        batch=_batch(recipe),
        sync=_sync(recipe, stage) if stage.stage == 0 else 0,
    )


def in_flight(stages: int, chunks: int, stage: int, micro_batches: int) -> list[int]:
    """The model chunks whose activations a rank keeps at the most, in the order they are run.

    Megatron-core 0.16.1, schedules.py: one forward, one backward (with one chunk), or interleaved, where
    chunks take turns every `stages` micro-batches.
    """
    if chunks == 1:
        return [0] * min(micro_batches, stages - stage)
    warmup = (stages - stage - 1) * 2 + (chunks - 1) * stages
    count = min(warmup + 1, micro_batches * chunks)
    return [i // stages % chunks for i in range(count)]


def _batch(recipe: Recipe) -> int:
    """All sequences as long as the longest: see Batch for what a token takes."""
    rollout, floats = recipe.rollout, 4 if recipe.algorithm.kl is not None else 3
    sequences = rollout.prompts * rollout.samples // recipe.learner.data_parallel
    return 3 * sequences * longest(recipe).sequence * (8 + 1 + 4 * floats)


def _sync(recipe: Recipe, stage: Stage) -> int:
    """A bucket as tensors and as what is sent; a tensor as shards, joined, and cast."""
    bucket = recipe.sync.bucket_mib << 20
    return bucket + 3 * stage.largest


def as_gib(rank: RankMemory) -> dict[str, float | int | list[int]]:
    """For JSON: bytes in GiB, under names that end in _gib."""
    values = asdict(rank)
    plain = {name: values.pop(name) for name in ("stage", "ranks", "in_flight")}
    sizes = {f"{name}_gib": round(value / GIB, 3) for name, value in values.items()}
    return {
        **plain,
        "params_gib": sizes.pop("weights_gib"),
        **sizes,
        "optimizer_gib": round(rank.optimizer / GIB, 3),
        "static_gib": round(rank.static / GIB, 3),
        "peak_gib": round(rank.peak / GIB, 3),
    }
