"""Micro-batches: packed and in rows, over many steps, and where their tokens are on each rank."""

import random

from megatron_fp16rl.data.micro_batches import (
    balanced_split,
    group_by_length,
    group_to_fill,
    in_packs,
    in_rows,
    split_until,
)
from megatron_fp16rl.platform import cuda, meta
from megatron_fp16rl.recipe.learner import Padding


def made_in_steps(packed, multiple, budget=20_480, steps=200):
    """Of one of four ranks, as the learner makes them, responses of 8,192 at most: shapes and tokens."""
    draw, shapes, tokens = random.Random(0), set(), 0
    for _ in range(steps):
        for sequences in (128, 32):  # those scored, and those of an update
            ranks = [
                [50 + min(8192, int(draw.lognormvariate(7.5, 0.7))) for _ in range(sequences)]
                for _ in range(4)
            ]
            groups = [
                group_to_fill(lengths, budget)
                if packed
                else group_by_length(lengths, budget, multiple)
                for lengths in ranks
            ]
            count = max(map(len, groups))
            mine = split_until(groups[0], ranks[0], count, packed)
            assert len(mine) == count
            made = (in_packs if packed else in_rows)(mine, ranks[0], Padding(row=multiple), False)
            assert sorted(i for m in made for i in m.sequences) == list(range(sequences))
            for m in made:
                assert m.tokens <= budget
                assert m.lengths == [ranks[0][i] for i in m.sequences]
                assert all(a <= b for a, b in zip(m.lengths, m.rooms, strict=True))
                assert sum(m.rooms) <= m.tokens
            shapes.update(m.shape for m in made)
            tokens += sum(m.tokens for m in made)
    return shapes, tokens


def test_kernels_see_few_shapes():
    """cuDNN plans its attention for each, and keeps every plan: by length there are a few dozen."""
    varied, exact = made_in_steps(False, 1)
    assert meta.PAD_TO_MULTIPLE_OF == cuda.PAD_TO_MULTIPLE_OF  # plans are of a GPU's
    few, padded = made_in_steps(False, cuda.PAD_TO_MULTIPLE_OF)
    assert len(varied) > 3_000
    assert len(few) <= 150
    assert len({seq for _, seq in few}) <= 36
    assert padded < 1.05 * exact
    packs, packed = made_in_steps(True, cuda.PAD_TO_MULTIPLE_OF)
    assert len(packs) <= 80
    _, unpadded = made_in_steps(True, 1)
    assert unpadded < packed < 1.01 * unpadded
    assert packed < 0.95 * padded


def test_one_shape_where_the_schedule_needs_it():
    lengths = [5, 9, 3, 7, 8]
    packs = in_packs([[0, 1], [2, 3], [4]], lengths, Padding(4, 16), one_shape=True)
    assert [m.shape for m in packs] == [(1, 32)] * 3  # 8 + 12 of the first, in sixteens
    assert [m.rooms for m in packs] == [[8, 12], [4, 8], [8]]
    rows = in_rows([[2, 0], [3], [4, 1]], lengths, Padding(4, 4), one_shape=True)
    assert [m.shape for m in rows] == [(2, 12)] * 3


def test_ranks_get_equal_work():
    """Of two ranks, the one with the long sequences would be waited for if both got equal tokens."""
    draw = random.Random(1)

    def work(length):
        return length * (1 + length / 500)

    def waited_for(cost):
        """The most work of a rank, over the mean, in many updates."""
        whole = worst = 0.0
        for lengths in updates:
            shares = balanced_split([cost(n) for n in lengths], 2)
            assert sorted(map(len, shares)) == [8, 8]
            of_each = [sum(work(lengths[i]) for i in share) for share in shares]
            worst, whole = worst + max(of_each), whole + sum(of_each) / 2
        return worst / whole

    updates = [[int(draw.expovariate(1 / 500)) + 1 for _ in range(16)] for _ in range(200)]
    assert waited_for(work) - 1 < 0.6 * (waited_for(lambda n: n) - 1)
