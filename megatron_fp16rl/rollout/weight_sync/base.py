"""What a weight transport is; each is one file beside this one. `connect` in the package chooses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from megatron_fp16rl.models.parts import Part, whole
from megatron_fp16rl.parallel import World
from megatron_fp16rl.rollout.client import Client, ServerError

WeightStream = Iterator[tuple[str, torch.Tensor]]  # (Hugging Face name, full tensor)


class Weights(Protocol):
    """A learner's weights on their way to servers. Learner.exported is one."""

    @property
    def parts(self) -> list[Part]:
        """What this rank offers; all ranks together offer each number once. Always the same."""
        ...

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor of this rank in which parts with such a key lie."""
        ...

    @property
    def memory(self) -> object:
        """Says where these tensors lie, until it changes; None if `tensor` computes any."""
        ...

    def check(self) -> None:
        """Collective: raises on all ranks for weights that servers cannot hold."""
        ...

    def whole(self, limit: int = ...) -> WeightStream:
        """Full tensors on rank 0, gathered at most `limit` bytes at a time. Collective; see `check`."""
        ...


class WholeWeights:
    """Weights that rank 0 has in full."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]
    ) -> None:
        """shapes: of the tensors by name, empty on other ranks. read: returns one."""
        self.parts = [whole(name, tuple(shape)) for name, shape in shapes.items()]
        self.tensor, self.memory = read, None

    def check(self) -> None:
        """Takes them as they are."""

    def whole(self, limit: int = 0) -> WeightStream:
        return ((part.name, self.tensor(part.key)) for part in self.parts)


class SyncFailed(RuntimeError):
    """Weights did not arrive, or not in time (`sync.timeout_s`)."""


class Transport(Protocol):
    """Carries weights into running servers. Every learner rank has one; `send` is collective.

    The servers know the new weights under a version. An update that was interrupted leaves a version
    that no rollout accepts.
    """

    def send(self, weights: Weights, version: str, servers: Sequence[Client]) -> int:
        """Sends the weights to the servers, which rank 0 knows. Returns the bytes sent to each, on rank 0.

        Raises on every rank what a server answered, or SyncFailed: the weights of all servers are then
        undefined.
        """
        ...

    def alive(self, servers: Sequence[Client]) -> list[Client]:
        """After a failure of `send`, the servers with which it can be tried again."""
        ...

    def close(self) -> None:
        """Releases the servers. Not for the end of a run: they end with it."""
        ...


class FromRank0:
    """A transport for which weights are gathered to rank 0, and sent from there."""

    def __init__(self, world: World, sender: "Sender | None", limit: int) -> None:
        """sender: what rank 0 sends with. limit: bytes that are gathered at a time."""
        self.world, self.sender, self.limit = world, sender, limit

    def send(self, weights: Weights, version: str, servers: Sequence[Client]) -> int:
        """See Transport."""
        # Nothing is gathered yet: each tensor is, on all ranks, when it is drawn from the stream.
        tensors, sent, failure = weights.whole(self.limit), 0, None
        if self.sender is not None:
            try:
                sent = self.sender.send(tensors, version, servers)
            except (ServerError, SyncFailed) as error:
                failure = str(error)
        for _ in tensors:
            pass  # after a failure, the other ranks still gather with this one
        sent, failure = self.world.broadcast_from_rank0((sent, failure))
        if failure is not None:
            raise SyncFailed(failure)
        return sent

    def alive(self, servers: Sequence[Client]) -> list[Client]:
        """See Transport."""
        return self.sender.alive(servers) if self.sender is not None else []

    def close(self) -> None:
        """See Transport."""
        if self.sender is not None:
            self.sender.close()


class Sender(Protocol):
    """Rank 0's end of a transport that takes full tensors from there; otherwise as Transport."""

    def send(self, tensors: WeightStream, version: str, servers: Sequence[Client]) -> int: ...

    def alive(self, servers: Sequence[Client]) -> list[Client]: ...

    def close(self) -> None: ...
