"""The reference policy: a snapshot of weights on the host, swapped into the model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_fp16rl.learner.model import Model


class Reference:
    """The weights that `model` has at construction. With LoRA only the adapters: the rest never changes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        # Only copies from pinned memory are asynchronous.
        pinned = model.world.device.type == "cuda"
        self._host = [
            torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)
            for weight in self._weights()
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has these weights inside the block, and its own again after it, to the last bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """One parameter at a time, by way of a copy on the device: the host never waits for a copy."""
        for weight, host in zip(self._weights(), self._host, strict=True):
            current = weight.clone()
            weight.copy_(host, non_blocking=True)
            host.copy_(current, non_blocking=True)

    def _weights(self) -> Iterator[torch.Tensor]:
        return (shard.parameter.detach() for shard in self.model.trained)
