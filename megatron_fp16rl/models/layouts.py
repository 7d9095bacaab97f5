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
class DeltaShapes:
    """Of layers with a gated delta net."""

    key_heads: int  # of queries as well
    value_heads: int  # a multiple of it
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Shapes:
    """The numbers of a model that layouts depend on."""

    heads: int
    groups: int  # key-value heads
    head_dim: int
    vocabulary: int
    padded_vocabulary: int  # a multiple of the tensor-parallel size
    delta: DeltaShapes | None = None


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


class GatedQueryKeyValue(QueryKeyValue):
    """The same where q_proj has, head by head, a query and the gate of its output: by group all gates follow all queries."""

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        gated, *others = tensors
        by_head = gated.unflatten(0, (shapes.groups, -1, 2, shapes.head_dim))
        return super().split([by_head.transpose(1, 2).flatten(0, 3), *others], ranks, shapes)

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        by_group = torch.cat(shards).unflatten(0, (shapes.groups, -1))
        queries = 2 * shapes.heads // shapes.groups * shapes.head_dim
        gated, *others = by_group.split([queries, shapes.head_dim, shapes.head_dim], 1)
        by_head = gated.unflatten(1, (2, -1, shapes.head_dim)).transpose(1, 2)
        return [by_head.flatten(0, 3), *(part.flatten(0, 1) for part in others)]


class DeltaInput:
    """in_proj_qkvz and in_proj_ba, each by key head: query, key, values, gates (z); betas, alphas.

    A rank has all its queries, then all its keys, and so on.
    """

    dim = 0

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        assert shapes.delta is not None
        sections = [
            section
            for tensor, sizes in zip(tensors, self._sizes(shapes.delta), strict=True)
            for section in tensor.unflatten(0, (shapes.delta.key_heads, -1)).split(sizes, 1)
        ]
        by_rank = zip(*(section.chunk(ranks) for section in sections), strict=True)
        return [torch.cat([part.flatten(0, 1) for part in parts]) for parts in by_rank]

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        assert shapes.delta is not None
        heads = shapes.delta.key_heads // len(shards)
        sizes = [size for tensor in self._sizes(shapes.delta) for size in tensor]
        by_rank = [shard.split([heads * size for size in sizes]) for shard in shards]
        sections = [
            torch.cat(parts).unflatten(0, (shapes.delta.key_heads, -1))
            for parts in zip(*by_rank, strict=True)
        ]
        return [torch.cat(s, 1).flatten(0, 1) for s in (sections[:4], sections[4:])]

    @staticmethod
    def _sizes(delta: DeltaShapes) -> list[list[int]]:
        """Rows of a key head in each section of each tensor."""
        values = delta.value_heads // delta.key_heads
        value = values * delta.value_dim
        return [[delta.key_dim, delta.key_dim, value, value], [values, values]]


class DeltaConvolution:
    """Channels of all queries, then of all keys, then of all values; a rank has its own of each."""

    dim = 0

    def split(self, tensors: Tensors, ranks: int, shapes: Shapes) -> Tensors:
        sections = (s.chunk(ranks) for s in tensors[0].split(self._sizes(shapes)))
        return [torch.cat(parts) for parts in zip(*sections, strict=True)]

    def join(self, shards: Tensors, shapes: Shapes) -> Tensors:
        sizes = [size // len(shards) for size in self._sizes(shapes)]
        sections = zip(*(shard.split(sizes) for shard in shards), strict=True)
        return [torch.cat([part for parts in sections for part in parts])]

    @staticmethod
    def _sizes(shapes: Shapes) -> list[int]:
        assert shapes.delta is not None
        key = shapes.delta.key_heads * shapes.delta.key_dim
        return [key, key, shapes.delta.value_heads * shapes.delta.value_dim]


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
