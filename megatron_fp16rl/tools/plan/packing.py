"""What packing is worth: the padding of a recipe's updates, packed and in rows, for drawn lengths."""

import random
from dataclasses import dataclass

from megatron_fp16rl.data.micro_batches import (
    MicroBatch,
    group_by_length,
    group_to_fill,
    in_packs,
    in_rows,
)
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.lengths import drawn_lengths, padding

_SEQUENCES = 4096  # drawn, in as many updates as they make


@dataclass(frozen=True)
class Waste:
    """The share of the tokens that a learner runs which is padding, and in how many shapes it runs them."""

    share: float
    shapes: int


@dataclass(frozen=True)
class Packing:
    """The same sequences, packed and in rows."""

    packed: Waste
    rows: Waste


def packing(recipe: Recipe, prompt: float, mean: float, most: int) -> Packing:
    """Of one rank's updates. prompt: tokens of each. mean, most: of the responses, see drawn_lengths."""
    learner = recipe.learner
    draw = drawn_lengths(mean, most, random.Random(0))
    size = learner.global_batch_size // learner.data_parallel
    updates = [
        [round(prompt) + draw() for _ in range(size)] for _ in range(max(1, _SEQUENCES // size))
    ]
    to, budget = padding(recipe), learner.micro_batch_tokens * learner.context_parallel
    one_shape = learner.model_chunks > 1
    packed, rows = [], []
    for lengths in updates:
        groups = group_to_fill(lengths, budget, to.sequence)
        packed += in_packs(groups, lengths, to, one_shape)
        groups = group_by_length(lengths, budget, to.row, one_shape)
        rows += in_rows(groups, lengths, to, one_shape)
    return Packing(_waste(packed), _waste(rows))


def _waste(made: list[MicroBatch]) -> Waste:
    run, real = sum(m.tokens for m in made), sum(sum(m.lengths) for m in made)
    return Waste(1 - real / run, len({m.shape for m in made}))
