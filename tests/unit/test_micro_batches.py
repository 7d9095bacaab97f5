"""Padded shapes of micro-batches, over many steps."""

import random

from megatron_fp16rl.data.micro_batches import group_by_length, padded_shapes, split_until
from megatron_fp16rl.platform import cuda, meta


def shapes_of_steps(multiple, budget=20_480, steps=200):
    """Of all micro-batches of one of four ranks, as the learner cuts them, responses of 8,192 at most."""
    draw, shapes, tokens = random.Random(0), set(), 0
    for _ in range(steps):
        for sequences in (128, 32):  # those scored, and those of an update
            ranks = [
                [50 + min(8192, int(draw.lognormvariate(7.5, 0.7))) for _ in range(sequences)]
                for _ in range(4)
            ]
            wanted = max(len(group_by_length(lengths, budget, multiple)) for lengths in ranks)
            parts = split_until(group_by_length(ranks[0], budget, multiple), ranks[0], wanted)
            made = padded_shapes(parts, ranks[0], multiple)
            assert sorted(i for part in parts for i in part) == list(range(sequences))
            assert all(rows * seq <= budget for rows, seq in made)
            assert all(
                ranks[0][i] <= seq for part, (_, seq) in zip(parts, made, strict=True) for i in part
            )
            shapes.update(made)
            tokens += sum(rows * seq for rows, seq in made)
    return shapes, tokens


def test_kernels_see_few_shapes():
    """cuDNN plans its attention for each, and keeps every plan: by length there are a few dozen."""
    varied, exact = shapes_of_steps(1)
    assert meta.PAD_TO_MULTIPLE_OF == cuda.PAD_TO_MULTIPLE_OF  # plans are of a GPU's
    few, padded = shapes_of_steps(cuda.PAD_TO_MULTIPLE_OF)
    assert len(varied) > 3_000
    assert len(few) <= 150
    assert len({seq for _, seq in few}) <= 36
    assert padded < 1.05 * exact
