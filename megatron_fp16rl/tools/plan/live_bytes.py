"""Counting the memory that tensors take, or would take on a device that has none."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of a device's tensors made inside a `with` block that are alive: `now`, and at the `peak`."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [s for s in self._storages(result) if s._cdata not in self._alive]
        if made:
            inputs = {storage._cdata for storage in self._storages((args, kwargs))}
            for storage in made:
                if storage._cdata not in inputs:  # a view, or an in-place result, allocates nothing
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def remove(_: object) -> None:
            del self._alive[key]
            self.now -= size

        # torch keeps one Python object for a storage as long as it lives, saved for backward or not.
        self._alive[key] = weakref.ref(storage, remove)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _storages(self, values: Any) -> list[torch.UntypedStorage]:
        return [t.untyped_storage() for t in _tensors(values) if t.device.type == self.device]


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Of an operator's arguments or results. A million operators are planned: tree_leaves took a sixth of it."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors([*values.values()])


class Allocated:
    """The same of a GPU, by torch's allocator, when the block has ended."""

    now = peak = 0

    def __enter__(self) -> "Allocated":
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.now = torch.cuda.memory_allocated() - self._before
        self.peak = torch.cuda.max_memory_allocated() - self._before


def counted(device: torch.device) -> LiveBytes | Allocated:
    """Counts the bytes of a block's tensors: a GPU's allocator does, a CPU has none."""
    return Allocated() if device.type == "cuda" else LiveBytes(device.type)
