"""What both ends of transport `sliced` share: a store to agree in, and wires to send over.

A wire is a process group of one sender, its rank 0, and rank r of every server. What either end does
with wires runs in a daemon thread under a deadline: NCCL builds a communicator in the first broadcast,
and waits there for everybody for ever.
"""

import datetime
import json
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import astuple
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.models.parts import Part
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed
from megatron_fp16rl.rollout.weight_sync.group import abort, in_thread

_POLL_S = 0.005
_LOOK_S = 0.05  # between looks at whether another end has given up
_ABORT_S = 5
_VALUE_BYTES = 4 << 20  # torch's store closes the connection on values above 8 MiB

T = TypeVar("T")


class Wires:
    """One end's wires, and what the others of the update tell it. For one set of servers."""

    def __init__(self, control: str, store: dist.Store) -> None:
        """control: name of the group that rank 0 of the learner and all servers are."""
        self.control, self.store = control, store
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}

    def group(
        self, sender: int, rank: int, position: int, size: int, timeout_s: float
    ) -> dist.ProcessGroup:
        """The wire from a sender to rank `rank` of all servers; made when it is first used.

        position: of this end in it, 0 the sender, 1 and on the servers. size: of the group.
        """
        if (sender, rank) not in self._groups:
            from sglang.srt.utils import init_custom_process_group

            with nccl.without_watchdog():
                self._groups[sender, rank] = init_custom_process_group(
                    backend=platform.current().COLLECTIVES,
                    store=self.store,
                    world_size=size,
                    rank=position,
                    group_name=f"wire-{sender}-{rank}-{self.control}",  # the same at all ends
                    timeout=datetime.timedelta(seconds=timeout_s),
                )
        return self._groups[sender, rank]

    def watched(
        self,
        work: Callable[[], T],
        timeout_s: float,
        what: str,
        look: Callable[[], None] = lambda: None,
    ) -> T:
        """The result of `work`. Raises SyncFailed if it fails, is late, or another end has given up.

        Then the other ends give up too, and the wires are no longer to be used. look: called now and
        then, to raise what else ends the update.
        """
        running, began, looked = in_thread(work), time.monotonic(), 0.0
        try:
            while not running.done():
                wait([running], timeout=_POLL_S)
                now = time.monotonic()
                if now - began > timeout_s:
                    raise SyncFailed(f"{what} took more than {timeout_s:g} s (sync.timeout_s)")
                if now - looked > _LOOK_S:
                    looked = now
                    look()
                    self.check()
            return running.result()
        # The types of SyncFailed, gloo, NCCL, and the store.
        except (RuntimeError, OSError) as error:
            reason = str(error) if isinstance(error, SyncFailed) else f"{what} broke off: {error}"
            self.give_up(reason)
            raise SyncFailed(reason) from error
        finally:
            del running  # it holds the error, whose frames hold tensors

    def check(self) -> None:
        """Raises SyncFailed if another end has given up."""
        if self.store.check(["stop"]):
            raise SyncFailed(self.store.get("stop").decode())

    def give_up(self, reason: str) -> None:
        """Tells the other ends, and abandons the wires: what waits in one of them fails."""
        try:
            if not self.store.check(["stop"]):
                self.store.set("stop", reason)
        except (RuntimeError, OSError):
            pass  # whoever serves the store is gone, which tells the others as well
        self.abandon()

    def abandon(self) -> None:
        """Leaves all wires, alone."""
        groups, self._groups = list(self._groups.values()), {}
        if groups:
            wait([in_thread(lambda: _abort(groups))], timeout=_ABORT_S)


def _abort(groups: Sequence[dist.ProcessGroup]) -> None:
    for group in groups:
        abort(group)


def connect(host: str, port: int, timeout_s: float) -> dist.Store:
    """The store of a control group, at its rank 0, as both ends of an update use it."""
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore("sliced", store)


def write_json(store: dist.Store, key: str, value: Any) -> None:
    """Leaves a value for the other ends, compressed: the parts of a large model are megabytes of text."""
    data = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)
    pieces = [data[i : i + _VALUE_BYTES] for i in range(0, len(data), _VALUE_BYTES)]
    for number, piece in enumerate(pieces):
        store.set(f"{key}/{number}", piece)  # type: ignore[arg-type]  # it takes bytes
    store.set(key, str(len(pieces)))  # last: whoever sees it finds all pieces


def read_json(store: dist.Store, key: str) -> Any:
    """A value that another end has left; waits for it."""
    pieces = [store.get(f"{key}/{number}") for number in range(int(store.get(key)))]
    return json.loads(zlib.decompress(b"".join(pieces)))


def listed(parts: Sequence[Part]) -> list[Any]:
    """Parts as JSON has them; `parts_of` reads them."""
    return [astuple(part) for part in parts]


def parts_of(rows: Sequence[Any]) -> list[Part]:
    """The parts of `listed`."""
    return [
        Part(name, tuple(start), tuple(shape), key, offset, tuple(strides))
        for name, start, shape, key, offset, strides in rows
    ]
