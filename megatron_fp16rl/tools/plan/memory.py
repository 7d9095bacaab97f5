"""Memory of all of the learner's ranks, and the check that together they hold the model."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_fp16rl.learner.model import HFTensors
from megatron_fp16rl.models.check import parameters
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.lengths import largest_micro_batch
from megatron_fp16rl.tools.plan.rank import RankMemory, rank_memory


@dataclass(frozen=True)
class LearnerMemory:
    """ranks: one for each pipeline stage. exported: tensors of all stages. faults: of these; see `faults_of`."""

    ranks: list[RankMemory]
    exported: HFTensors
    faults: list[str]

    @property
    def worst(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)


def learner_memory(
    recipe: Recipe,
    config: PretrainedConfig,
    progress: Callable[[str], None] = lambda line: None,
) -> LearnerMemory:
    """Builds one rank of each pipeline stage, and runs a micro-batch through it.

    config: the model's transformers configuration. Raises RecipeError, and whatever Megatron refuses
    the recipe with.
    """
    stages = recipe.learner.pipeline_parallel
    batch = largest_micro_batch(recipe)
    ranks: list[RankMemory] = []
    exported: HFTensors = []
    for stage in range(stages):
        progress(f"stage {stage + 1} of {stages}: building, {batch.rows} x {batch.seq} tokens")
        rank, tensors = rank_memory(recipe, config, stage)
        ranks.append(rank)
        exported += [tensor for of_parameter in tensors for tensor in of_parameter]
    progress("comparing the ranks' tensors with transformers'")
    return LearnerMemory(ranks, exported, faults_of(exported, config))


def faults_of(exported: HFTensors, config: PretrainedConfig) -> list[str]:
    """Where an export differs from transformers' own model: each names a tensor and what is wrong."""
    expected, shapes = parameters(config), dict(exported)
    times = Counter(name for name, _ in exported)
    faults = [f"{name} is exported {n} times" for name, n in times.items() if n > 1]
    faults += [f"{name} is not exported" for name in expected if name not in shapes]
    faults += [f"{name} is unknown to transformers" for name in shapes if name not in expected]
    faults += [
        f"{name} is exported as {tuple(shape)}, but is {tuple(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    return faults
