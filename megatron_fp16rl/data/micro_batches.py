"""Which sequences go to which data-parallel rank, and into which micro-batch.

Indices of sequences in, lists of indices out: no tensors, so that a plan can ask as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_fp16rl.data.batch import Batch

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of a batch, and the [rows, seq] to which they are padded."""

    sequences: list[int]
    shape: tuple[int, int]

    def select(self, batch: B) -> B:
        return batch.rows(self.sequences, self.shape[1]).padded(*self.shape)


def balanced_split(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank: as many sequences for each, and about as many tokens."""
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    # Each round gives one sequence to every rank, the longest to the rank with the fewest tokens.
    for start in range(0, len(lengths), ranks):
        fewest_first = sorted(range(ranks), key=lambda rank: (tokens[rank], rank))
        for rank, i in zip(fewest_first, longest_first[start : start + ranks], strict=True):
            shares[rank].append(i)
            tokens[rank] += lengths[i]
    return shares


def split_updates(
    lengths: Sequence[int], order: Sequence[int], size: int, ranks: int
) -> list[list[int]]:
    """Indices for each rank, update after update; each update takes the next `size` of `order`."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), size):
        update = order[start : start + size]
        parts = balanced_split([lengths[i] for i in update], ranks)
        for share, part in zip(shares, parts, strict=True):
            share += [update[i] for i in part]
    return shares


def padded_length(length: int, multiple: int) -> int:
    """The next multiple. Kernels are planned and compiled for each shape, so there should be few."""
    return -(-length // multiple) * multiple


def group_by_length(
    lengths: Sequence[int], budget: int, multiple: int = 1, pad_to_max: bool = False
) -> list[list[int]]:
    """Groups sequences of similar length into micro-batches: indices, the shortest first.

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


def split_until(
    micro_batches: list[list[int]], lengths: Sequence[int], count: int
) -> list[list[int]]:
    """Halves the largest micro-batch until there are `count`; fewer if there are not so many sequences."""
    micro_batches = list(micro_batches)
    while len(micro_batches) < count:
        divisible = [i for i, rows in enumerate(micro_batches) if len(rows) > 1]
        if not divisible:
            break
        largest = max(
            divisible, key=lambda i: len(micro_batches[i]) * lengths[micro_batches[i][-1]]
        )
        rows = micro_batches[largest]
        half = len(rows) // 2
        micro_batches[largest : largest + 1] = [rows[:half], rows[half:]]
    return micro_batches


def padded_shapes(
    micro_batches: list[list[int]],
    lengths: Sequence[int],
    multiple: int,
    pad_to_max: bool = False,
) -> list[tuple[int, int]]:
    """[rows, seq] of micro-batches whose last sequence is their longest. pad_to_max: one shape for all."""
    shapes = [(len(rows), padded_length(lengths[rows[-1]], multiple)) for rows in micro_batches]
    if pad_to_max:
        return [(max(rows for rows, _ in shapes), max(seq for _, seq in shapes))] * len(shapes)
    return shapes
