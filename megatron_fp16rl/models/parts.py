"""Parts of weights: which numbers of a Hugging Face tensor lie where in somebody's memory.

A learner's rank offers parts, which its shards hold; a server's rank wants parts, which its parameters
hold. What goes from one to the other is where the two overlap. Each end computes the same messages by
itself: only offers and wants are exchanged, once.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

Extent = tuple[int, ...]  # of each dimension

Dtypes = Callable[[str], torch.dtype]  # in which the tensor of a Hugging Face name travels
_ALIGNMENT = 16  # bytes: of a part in a message, whatever the dtypes before it


@dataclass(frozen=True)
class Part:
    """A box of a Hugging Face tensor, and where its numbers are in its holder's memory.

    name          Hugging Face's
    start, shape  of the box in that tensor
    key           the holder's name of its own tensor
    offset        of the box's first number in the holder's tensor, in numbers
    strides       in the holder's tensor, along the dimensions of the box
    """

    name: str
    start: Extent
    shape: Extent
    key: str
    offset: int
    strides: Extent

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> Extent:
        """The first number of the tensor behind the box, along each dimension."""
        return tuple(a + b for a, b in zip(self.start, self.shape, strict=True))

    def within(self, other: "Part") -> "Part | None":
        """What lies in the box of another part of the same tensor as well."""
        start = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.shape, other.start, other.shape, start, strict=True)
        shape = tuple(min(a + b, c + d) - at for a, b, c, d, at in ends)
        return self._box(start, shape) if min(shape, default=1) > 0 else None

    def halves(self) -> "tuple[Part, Part]":
        """Cut in two across the first dimension that can be cut: rows stay whole as long as possible."""
        dim = next(i for i, size in enumerate(self.shape) if size > 1)
        middle = self.shape[dim] // 2
        sizes = ((0, middle), (middle, self.shape[dim] - middle))

        def half(skipped: int, size: int) -> Part:
            start = (*self.start[:dim], self.start[dim] + skipped, *self.start[dim + 1 :])
            return self._box(start, (*self.shape[:dim], size, *self.shape[dim + 1 :]))

        return half(*sizes[0]), half(*sizes[1])

    def _box(self, start: Extent, shape: Extent) -> "Part":
        moved = (
            (new - old) * by for new, old, by in zip(start, self.start, self.strides, strict=True)
        )
        return replace(self, start=start, shape=shape, offset=self.offset + sum(moved))

    @property
    def is_dense(self) -> bool:
        """Whether the numbers lie one behind the other in the holder's memory."""
        steps = zip(self.shape, self.strides, contiguous(self.shape), strict=True)
        return all(size == 1 or stride == step for size, stride, step in steps)

    def with_next(self, other: "Part") -> "Part | None":
        """Both as one, a row of numbers that is no box any more, if the other lies right behind."""
        ends_there = self.key == other.key and self.offset + self.numel == other.offset
        if not (ends_there and self.is_dense and other.is_dense):
            return None
        return replace(self, start=(0,), shape=(self.numel + other.numel,), strides=(1,))

    def view(self, holder: torch.Tensor) -> torch.Tensor:
        """The box's numbers in the holder's tensor, which is not copied."""
        return holder.as_strided(self.shape, self.strides, holder.storage_offset() + self.offset)


def contiguous(shape: Extent) -> Extent:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def whole(name: str, shape: Extent, key: str | None = None) -> Part:
    """A full tensor, contiguous in its holder's memory."""
    return Part(name, (0,) * len(shape), shape, key or name, 0, contiguous(shape))


@dataclass(frozen=True)
class Message:
    """Parts that go from one rank to another in one piece.

    parts   of the sender, of the message, of the receiver; the same box in each
    nbytes  of all, gaps between them included
    """

    parts: list[tuple[Part, Part, Part]]
    nbytes: int


def messages(
    offers: Iterable[Part],
    wants: Iterable[Part],
    limit: int,
    dtype: Dtypes,
    alone: int,
) -> list[Message]:
    """What one sender sends one receiver, in order: messages of at most `limit` bytes.

    dtype: in which the tensor of a Hugging Face name travels. A part larger than a message is cut; one
    of `alone` bytes or more is a message of its own, which need not be copied together.
    """
    found: list[Message] = []
    parts: list[tuple[Part, Part, Part]] = []
    end = 0
    for source, target in _pairs(offers, wants, limit, dtype):
        size = dtype(target.name).itemsize
        strides = contiguous(target.shape)
        if target.numel * size >= alone:
            middle = replace(target, key="", offset=0, strides=strides)
            found.append(Message([(source, middle, target)], target.numel * size))
            continue
        at = -(-end // _ALIGNMENT) * _ALIGNMENT
        if parts and at + target.numel * size > limit:
            found.append(Message(parts, end))
            parts, at = [], 0
        middle = replace(target, key="", offset=at // size, strides=strides)
        parts.append((source, middle, target))
        end = at + target.numel * size
    return [*found, Message(parts, end)] if parts else found


def _pairs(
    offers: Iterable[Part], wants: Iterable[Part], limit: int, dtype: Dtypes
) -> Iterator[tuple[Part, Part]]:
    """What goes from where to where, in pieces of at most `limit` bytes.

    Pieces that lie one behind the other at both ends, as gate and up do, are one.
    """
    offered = by_name(offers)
    last: tuple[Part, Part] | None = None
    for want in wants:
        most = limit // dtype(want.name).itemsize
        for offer in offered.get(want.name, ()):
            if (wanted := want.within(offer)) is None:
                continue
            for target in _cut(wanted, most):
                source = offer.within(target)
                assert source is not None
                if last is not None and dtype(last[1].name) == dtype(want.name):
                    one = last[0].with_next(source), last[1].with_next(target)
                    if one[0] and one[1] and one[0].numel <= most:
                        last = one[0], one[1]
                        continue
                if last is not None:
                    yield last
                last = source, target
    if last is not None:
        yield last


def by_name(parts: Iterable[Part]) -> dict[str, list[Part]]:
    """Parts by their Hugging Face tensor."""
    grouped: dict[str, list[Part]] = {}
    for part in parts:
        grouped.setdefault(part.name, []).append(part)
    return grouped


def _cut(part: Part, most: int) -> Iterator[Part]:
    if part.numel <= most:
        yield part
    else:
        for half in part.halves():
            yield from _cut(half, most)


def uncovered(offers: Iterable[Part], wants: Iterable[Part]) -> list[str]:
    """The tensors of which a number that is wanted is not offered exactly once."""
    offered = by_name(offers)
    bad = {}
    for want in wants:
        shared = [p for offer in offered.get(want.name, ()) if (p := want.within(offer))]
        twice = any(a.within(b) for a, b in itertools.combinations(shared, 2))
        if twice or sum(part.numel for part in shared) != want.numel:
            bad[want.name] = True
    return list(bad)


def rounds(counts: Sequence[int], me: int, ways: int) -> list[tuple[int, int]]:
    """The order in which a rank exchanges its messages with its peers: (peer, number of the message).

    counts: of messages with each peer. me: this rank's number among its kind. ways: the larger of the
    numbers of senders and of receivers. In each round every rank has one peer at most, a Latin square;
    both ends go by rounds, so that whoever waits does so for somebody who is at an earlier round.
    """
    turns = sorted(
        (number, (me + peer) % ways, peer)
        for peer, count in enumerate(counts)
        for number in range(count)
    )
    return [(peer, number) for number, _, peer in turns]


class Course:
    """One end's messages in the order in which they travel, and where they lie in its memory.

    Two are held at a time: one on its way, and one that is packed or unpacked. A part that travels alone,
    and lies in memory as it travels, is sent from there or received into it.
    """

    def __init__(
        self, messages: Sequence[Message], end: int, dtype: Dtypes, device: torch.device
    ) -> None:
        """end: of the parts of a message, the index of those at this end: 0 sends, 2 receives."""
        self.messages, self.end, self.dtype, self.device = messages, end, dtype, device
        self._flat: list[torch.Tensor | None] = [None, None]
        self._views: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._memory: object = None

    def __len__(self) -> int:
        return len(self.messages)

    def prepare(self, memory: object) -> None:
        """Before a passage. memory: says where this end's tensors lie; None if they may move during it.

        Thousands of views take as long as the copies: they are made once for the same memory.
        """
        if memory is None or memory != self._memory:
            self._views.clear()
        self._memory = memory

    def place(self, turn: int, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The bytes that message `turn` is sent from, or received into. tensor: this end's, by key."""
        views, places = self._ends(turn, tensor)
        return self._buffer(turn)[: self.messages[turn].nbytes] if places else _as_bytes(views[0])

    def pack(self, turn: int, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """`place`, filled with the parts in the dtypes that they travel in."""
        views, places = self._ends(turn, tensor)
        if places:
            torch._foreach_copy_(places, views)
        return self.place(turn, tensor)

    def unpack(self, turn: int, tensor: Callable[[str], torch.Tensor]) -> None:
        """Copies a message that was received to where its parts belong."""
        views, places = self._ends(turn, tensor)
        if places:
            torch._foreach_copy_(views, places)

    def _ends(
        self, turn: int, tensor: Callable[[str], torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parts of a message where this end has them, and in the buffer; not there if sent from here."""
        if (known := self._views.get(turn)) is not None:
            return known
        parts = self.messages[turn].parts
        views = [part[self.end].view(tensor(part[self.end].key)) for part in parts]
        kinds = [self.dtype(part.name) for _, part, _ in parts]
        if len(views) == 1 and views[0].dtype == kinds[0] and views[0].is_contiguous():
            places = []
        else:
            flat = self._buffer(turn)
            typed = {kind: flat.view(kind) for kind in set(kinds)}
            middles = (part for _, part, _ in parts)
            places = [part.view(typed[k]) for part, k in zip(middles, kinds, strict=True)]
        if self._memory is not None:
            self._views[turn] = views, places
        return views, places

    def _buffer(self, turn: int) -> torch.Tensor:
        flat = self._flat[turn % 2]
        if flat is None:
            largest = max(message.nbytes for message in self.messages)
            size = -(-largest // _ALIGNMENT) * _ALIGNMENT
            flat = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._flat[turn % 2] = flat
        return flat


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def address(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Where tensors lie; see Course.prepare."""
    return tuple(tensor.data_ptr() for tensor in tensors)
