"""Which sequences go to which data-parallel rank, and into which micro-batch.

Indices of sequences in, lists of indices out: no tensors, so that a plan can ask as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fp16rl.recipe.learner import Padding


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of a batch, and how the model runs them: packed into one row, or each in a row of its own.

    lengths  of the sequences, in tokens
    rooms    of the sequences in their rows: lengths and padding
    shape    [rows, tokens] that the model runs; what the rooms leave is padding, too
    """

    sequences: list[int]
    lengths: list[int]
    rooms: list[int]
    shape: tuple[int, int]
    packed: bool

    @property
    def tokens(self) -> int:
        """That the model runs, padding included, over all context-parallel ranks."""
        return self.shape[0] * self.shape[1]


def balanced_split(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices for each rank: as many sequences for each, and about as much work."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    # The longest first, each to the rank with the least work of those that may have more sequences.
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        open_ranks = (rank for rank in range(ranks) if len(shares[rank]) < len(work) // ranks)
        rank = min(open_ranks, key=lambda rank: (total[rank], rank))
        shares[rank].append(i)
        total[rank] += work[i]
    return shares


def split_updates(
    work: Sequence[float], order: Sequence[int], size: int, ranks: int
) -> list[list[int]]:
    """Indices for each rank, update after update; each update takes the next `size` of `order`."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), size):
        update = order[start : start + size]
        parts = balanced_split([work[i] for i in update], ranks)
        for share, part in zip(shares, parts, strict=True):
            share += [update[i] for i in part]
    return shares


def padded_length(length: int, multiple: int) -> int:
    """The next multiple. Kernels are planned and compiled for each shape, so there should be few."""
    return -(-length // multiple) * multiple


def group_by_length(
    lengths: Sequence[int], budget: int, multiple: int = 1, pad_to_max: bool = False
) -> list[list[int]]:
    """Groups sequences of similar length into micro-batches of rows: indices, the shortest first.

    budget: the most padded tokens of a micro-batch, unless a single sequence has more. multiple: see
    `padded_length`. pad_to_max: all micro-batches are padded to the longest sequence of all.
    """
    longest = max(lengths)
    micro_batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):  # the last added is the longest
        current = micro_batches[-1]
        padded = padded_length(longest if pad_to_max else lengths[i], multiple)
        if current and (len(current) + 1) * padded > budget:
            micro_batches.append([i])
        else:
            current.append(i)
    return micro_batches


def group_to_fill(lengths: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Groups sequences into micro-batches of one row: indices. Each goes where it first fits, the longest first.

    budget: the most tokens of a micro-batch, unless a single sequence has more. multiple: of the tokens of a sequence.
    """
    micro_batches: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = padded_length(lengths[i], multiple)
        fitting = (at for at, free in enumerate(left) if free >= room)
        at = next(fitting, len(left))
        if at == len(left):
            micro_batches.append([])
            left.append(budget)
        micro_batches[at].append(i)
        left[at] -= room
    return micro_batches


def split_until(
    micro_batches: list[list[int]], lengths: Sequence[int], count: int, packed: bool = False
) -> list[list[int]]:
    """Halves the largest micro-batch until there are `count`; fewer if there are not so many sequences.

    packed: not into short and long sequences, but into halves of as many tokens.
    """

    def tokens(group: list[int]) -> int:
        of_each = [lengths[i] for i in group]
        return sum(of_each) if packed else len(group) * max(of_each)

    micro_batches = list(micro_batches)
    while len(micro_batches) < count:
        divisible = [i for i, group in enumerate(micro_batches) if len(group) > 1]
        if not divisible:
            break
        largest = max(divisible, key=lambda i: tokens(micro_batches[i]))
        group, half = micro_batches[largest], len(micro_batches[largest]) // 2
        halves = [group[::2], group[1::2]] if packed else [group[:half], group[half:]]
        micro_batches[largest : largest + 1] = halves
    return micro_batches


def in_rows(
    groups: list[list[int]], lengths: Sequence[int], padding: Padding, one_shape: bool
) -> list[MicroBatch]:
    """Micro-batches of a row a sequence. one_shape: all have as many rows, and as long ones."""
    shapes = [
        (len(group), padded_length(max(lengths[i] for i in group), padding.row)) for group in groups
    ]
    if one_shape:
        shapes = [(max(rows for rows, _ in shapes), max(seq for _, seq in shapes))] * len(shapes)
    return [
        MicroBatch(group, [lengths[i] for i in group], [shape[1]] * len(group), shape, packed=False)
        for group, shape in zip(groups, shapes, strict=True)
    ]


def in_packs(
    groups: list[list[int]], lengths: Sequence[int], padding: Padding, one_shape: bool
) -> list[MicroBatch]:
    """Micro-batches of one row, in which sequences follow each other. one_shape: all rows are as long."""
    rooms = [[padded_length(lengths[i], padding.sequence) for i in group] for group in groups]
    totals = [padded_length(sum(of_group), padding.row) for of_group in rooms]
    if one_shape:
        totals = [max(totals)] * len(totals)
    return [
        MicroBatch(group, [lengths[i] for i in group], of_group, (1, total), packed=True)
        for group, of_group, total in zip(groups, rooms, totals, strict=True)
    ]
