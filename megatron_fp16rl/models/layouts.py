"""How Hugging Face tensors make one Megatron parameter, and how tensor parallelism cuts it.

Each layout knows both directions:
    split(tensors, ranks, shapes)   Hugging Face tensors -> the shard of every rank
    join(shards, shapes)            the shards of all ranks -> Hugging Face tensors
and join(split(x)) is x, bit for bit. Both only move whole slices across one dimension, `dim`: `runs`
says which.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Shapes:
    """The numbers of a model that layouts depend on."""

    heads: int
    groups: int  # key-value heads
    head_dim: int
    vocabulary: int
    padded_vocabulary: int  # a multiple of the tensor-parallel size


class ParameterLayout(Hashable, Protocol):
    """See above."""

    @property
    def dim(self) -> int: ...

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors: ...

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors: ...


class Replicated:
    """The same on every rank (norms)."""

    dim = 0

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        return tensors * ranks

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        return shards[:1]


@dataclass(frozen=True)
class Cut:
    """Cut along a dimension: 0 for column-parallel linears, 1 for row-parallel ones."""

    dim: int

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        return list(tensors[0].chunk(ranks, self.dim))

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        return [torch.cat(shards, self.dim)]


class Stacked:
    """One expert's matrix or bias in a tensor of all experts, which holds matrices transposed.

    An expert is never cut: Megatron has biases in whole experts only. See Rule.expert.
    """

    dim = 0

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        return [tensor.mT if tensor.dim() == 2 else tensor for tensor in tensors]

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        return self.split(shards, 1, shapes)


class Vocabulary:
    """Rows are tokens; zero rows fill up to a multiple of the tensor-parallel size."""

    dim = 0

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        missing = shapes.padded_vocabulary - shapes.vocabulary
        padding = tensors[0].new_zeros(missing, *tensors[0].shape[1:])
        return list(torch.cat([tensors[0], padding]).chunk(ranks))

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        return [torch.cat(shards)[: shapes.vocabulary]]


class GatedRows:
    """gate_proj and up_proj: each rank holds its rows of the gate, then its rows of up."""

    dim = 0

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        gate, up = (t.chunk(ranks) for t in tensors)
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        gate, up = zip(*(s.chunk(2) for s in shards), strict=True)
        return [torch.cat(gate), torch.cat(up)]


class QueryKeyValue:
    """q, k, v (weights or biases) interleaved by group: its queries, its key, its value."""

    dim = 0

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        by_group = [t.unflatten(0, (shapes.groups, -1)) for t in tensors]
        return list(torch.cat(by_group, 1).flatten(0, 1).chunk(ranks))

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        by_group = torch.cat(shards).unflatten(0, (shapes.groups, -1))
        queries = shapes.heads // shapes.groups * shapes.head_dim
        parts = by_group.split([queries, shapes.head_dim, shapes.head_dim], 1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class Run:
    """Slices that are next to one another both in a rank's shard and in a Hugging Face tensor."""

    rank: int
    start: int  # in the shard
    at: int  # in the Hugging Face tensor
    length: int


@functools.cache
def runs(
    layout: ParameterLayout, length: int, dims: int, ranks: int, shapes: Shapes
) -> list[list[Run]]:
    """For each Hugging Face tensor of a parameter, where the slices across `layout.dim` come from.

    length, dims: of a shard across that dimension, and how many dimensions it has. Found by joining
    shards that hold the numbers of their slices.
    """
    shape = [length if dim == layout.dim else 1 for dim in range(dims)]
    shards = [torch.arange(rank * length, (rank + 1) * length).view(shape) for rank in range(ranks)]
    found = []
    for tensor in layout.join(shards, shapes):
        source = tensor.flatten()
        jumps = (source.diff() != 1) | (source[1:] % length == 0)
        starts = [0, *(jumps.nonzero().flatten() + 1).tolist()]
        found.append(
            [
                Run(int(source[at]) // length, int(source[at]) % length, at, end - at)
                for at, end in zip(starts, [*starts[1:], len(source)], strict=True)
            ]
        )
    return found
