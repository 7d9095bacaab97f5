"""The reference policy: weights that a model once had, kept on the host, and taken back for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from megatron_fp16rl.learner.model import Model


class Reference:
    """The weights that `model` has at this moment.

    Of a model with adapters these alone: its other weights stay what they are.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        pinned = model.world.device.type == "cuda"  # only from such memory are copies asynchronous
        self._kept = [
            torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)
            for weight in self._weights()
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has these weights inside the block, to the last bit its own after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Parameter by parameter, by way of one more on the device: nothing here waits for a copy."""
        for weight, kept in zip(self._weights(), self._kept, strict=True):
            own = weight.clone()
            weight.copy_(kept, non_blocking=True)
            kept.copy_(own, non_blocking=True)

    def _weights(self) -> Iterator[torch.Tensor]:
        return (piece.parameter.detach() for piece in chain(*self.model.trained))
