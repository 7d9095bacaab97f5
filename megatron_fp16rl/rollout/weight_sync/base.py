"""What a weight transport is; each is one file beside this one. `connect` in the package chooses."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from megatron_fp16rl.rollout.client import Client

WeightStream = Iterator[tuple[str, torch.Tensor]]  # (Hugging Face name, full tensor)
Export = Callable[[], WeightStream]  # as Learner.export: collective; it yields on rank 0 alone


class SyncFailed(RuntimeError):
    """Weights did not arrive, or not in time (`sync.timeout_s`)."""


class Transport(Protocol):
    """Carries weights into running servers. Every learner rank has one; `send` is collective.

    The servers know the new weights under a version. An update that was interrupted leaves a version
    that no rollout accepts.
    """

    def send(self, tensors: WeightStream, version: str, servers: Sequence[Client]) -> int:
        """Sends this rank's export to the servers. Returns the bytes sent to each.

        Raises what a server answered, or SyncFailed: the weights of all are then undefined.
        """
        ...

    def alive(self, servers: Sequence[Client]) -> list[Client]:
        """After a failure of `send`, the servers with which it can be tried again."""
        ...

    def close(self) -> None:
        """Releases the servers. Not for the end of a run: they end with it."""
        ...


class GatherOnly:
    """The transport of ranks other than 0, where weights are gathered to rank 0 and sent from there."""

    def send(self, tensors: WeightStream, version: str, servers: Sequence[Client]) -> int:
        """Takes part in the gathering: on these ranks the stream yields nothing."""
        for _ in tensors:
            pass
        return 0

    def alive(self, servers: Sequence[Client]) -> list[Client]:
        return []

    def close(self) -> None:
        """Holds nothing."""
