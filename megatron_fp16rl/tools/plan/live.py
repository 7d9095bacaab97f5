"""Counting the memory that tensors hold while code runs, on a device that has none."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of meta tensors made inside a `with` block that are alive.

    now    at this moment
    peak   at most, so far
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:  # else a view of something, or something written to
                self._see(storage)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def leave(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        # torch keeps one Python object for a storage as long as it lives, saved for backward or not.
        self._alive[key] = weakref.ref(storage, leave)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(things: object) -> list[torch.UntypedStorage]:
    tensors = [t for t in tree_leaves(things) if isinstance(t, torch.Tensor) and t.is_meta]
    return [tensor.untyped_storage() for tensor in tensors]
