"""The life of the group over which weights go: this process, as rank 0, and every rank of some servers.

What gloo forgives, NCCL does not. It makes its communicator in the first broadcast, and waits there for
all ranks, without a deadline. A destroy waits for what is under way, and for the other ranks of a node
to leave as well. So servers are watched while anything is done with them, it has a deadline, and what
does not end by itself is left to a thread for which nothing waits.
"""

import datetime
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.utils import meeting
from megatron_fp16rl.utils.processes import free_port

_LOOK_EVERY_S = 0.0005
# SGLang 0.5.23 looks so long for a meeting, and does nothing else then: torch's default.
_LATE_S = 1800
_ABORT_S = 5  # that an abort is waited for
# NCCL's watchdog is not to be before our own deadline, which names the servers that are late.
_NCCL_PATIENCE = 10

T = TypeVar("T")
Answers = dict[str, Future]  # by the server's URL


class SyncFailed(RuntimeError):
    """Weights did not arrive, or not in time (`sync.timeout_s`)."""


class Client(Protocol):
    """A server, as rollout.client.Client is: `post` raises unless the server agreed."""

    url: str

    def post(self, path: str, body: dict, admin: bool, timeout_s: float) -> object: ...

    def let_go(self, group: str, timeout_s: float) -> bool: ...

    @property
    def responds(self) -> bool: ...


class Group:
    """A group that is made once, used, and left; for other servers there is another."""

    def __init__(
        self, clients: Sequence[Client], ranks_per_server: int, host: str, timeout_s: float
    ) -> None:
        """host: address of this process, for the servers. timeout_s: of each thing that is done."""
        self.clients, self.ranks_per_server = list(clients), ranks_per_server
        self.host, self.timeout_s = host, timeout_s
        self.name = f"fp16rl-weights-{secrets.token_hex(4)}"
        self._handle: dist.ProcessGroup | None = None

    def meet(self) -> None:
        """Makes the group. Raises SyncFailed, and what a server answered."""
        world, port = 1 + self.ranks_per_server * len(self.clients), free_port(self.host)
        backend = platform.current().COLLECTIVES
        joining = self.ask(
            "/init_weights_update_group",
            lambda i: {
                "master_address": self.host,
                "master_port": port,
                "rank_offset": 1 + i * self.ranks_per_server,
                "world_size": world,
                "group_name": self.name,
                "backend": backend,
            },
        )
        self._handle = self._watched(
            lambda: self._join(backend, port, world), joining, "meeting the servers"
        )
        finish(joining)

    def ask(self, path: str, body: Callable[[int], dict] = lambda _: {}) -> Answers:
        """POSTs to all servers at once; body: of each, by its number."""
        return self._ask(self.clients, path, body)

    def broadcast(self, tensor: torch.Tensor, receiving: Answers) -> None:
        """Sends a tensor to all ranks, which `receiving` has asked to take it. Raises as `meet`."""

        def send() -> None:
            work = dist.broadcast(tensor, group=self._handle, group_src=0, async_op=True)
            while not work.is_completed():  # on a GPU `wait` alone does not
                time.sleep(_LOOK_EVERY_S)
            work.wait()

        self._watched(send, receiving, f"a broadcast of {tensor.nbytes} bytes")

    def part(self, staying: Sequence[Client]) -> None:
        """Leaves together with the servers that are still there. Raises as `meet`.

        They are asked before this process leaves, and answer when they have left: whoever leaves alone
        may wait for the others (NCCL's user guide on ncclCommDestroy).
        """
        handle, self._handle = self._handle, None
        if handle is None:
            return
        whole = list(staying) == self.clients
        leaving = self._ask(
            staying, "/destroy_weights_update_group", lambda _: {"group_name": self.name}
        )

        def leave() -> None:
            # A member that is gone can take part in nothing.
            dist.destroy_process_group(handle) if whole else abandon(handle)
            finish(leaving)

        self._watched(leave, leaving, "leaving the servers' last group")

    def forget(self) -> None:
        """Leaves alone, after a failure: on gloo this frees those who wait in the group."""
        handle, self._handle = self._handle, None
        if handle is not None:
            wait([in_thread(lambda: abandon(handle))], timeout=_ABORT_S)

    def _join(self, backend: str, port: int, world: int) -> dist.ProcessGroup:
        from sglang.srt.utils import init_custom_process_group  # takes seconds: servers do as well

        patience = self.timeout_s * (_NCCL_PATIENCE if backend == "nccl" else 1)
        try:
            met = meeting.store(self.host, port, world, True, self.timeout_s)
        except (RuntimeError, OSError):
            in_thread(lambda: meeting.turn_away(self.host, port, world, _LATE_S))
            raise
        with nccl.unattended():
            return init_custom_process_group(
                backend=backend,
                store=dist.PrefixStore(
                    self.name, met
                ),  # under the prefix that SGLang's ranks give it
                world_size=world,
                rank=0,
                group_name=self.name,
                timeout=datetime.timedelta(seconds=patience),
            )

    def _ask(self, clients: Sequence[Client], path: str, body: Callable[[int], dict]) -> Answers:
        def post(client: Client, content: dict) -> Future:
            return in_thread(lambda: client.post(path, content, True, self.timeout_s))

        return {client.url: post(client, body(i)) for i, client in enumerate(clients)}

    def _watched(self, work: Callable[[], T], answers: Answers, what: str) -> T:
        """What `work` returns, which goes on with servers that are to answer when they have done it."""
        doing = in_thread(work)
        deadline = time.monotonic() + self.timeout_s
        while not doing.done():
            wait([doing], timeout=_LOOK_EVERY_S)
            _raise_refusals(answers)  # a server that refuses never takes part
            if time.monotonic() > deadline:
                silent = ", ".join(url for url, answer in answers.items() if not answer.done())
                raise SyncFailed(
                    f"{what} took more than {self.timeout_s:g} s (sync.timeout_s); "
                    f"no answer from {silent or 'nobody: all have answered'}"
                )
        try:
            return doing.result()
        except (RuntimeError, OSError) as error:  # as gloo, NCCL and torch's store say it
            raise SyncFailed(f"{what} broke off: {error}") from error
        finally:
            del doing  # it holds the error, whose frames hold the store in which servers wait


def abandon(handle: dist.ProcessGroup) -> None:
    """Leaves a group in which something may be under way for ever; that fails."""
    if platform.current().COLLECTIVES == "nccl":
        dist.distributed_c10d._abort_process_group(handle)
    else:
        dist.destroy_process_group(handle)


def finish(answers: Answers) -> None:
    """Waits for all; raises what a server answered."""
    for answer in answers.values():
        answer.result()


def in_thread(work: Callable[[], T]) -> "Future[T]":
    """Does it in a thread that the end of the process does not wait for."""
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(work, future), name="sync", daemon=True).start()
    return future


def _run(work: Callable[[], T], future: "Future[T]") -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
        del future  # else the error keeps itself alive, and what its frames hold
    else:
        future.set_result(result)


def _raise_refusals(answers: Answers) -> None:
    for answer in answers.values():
        if answer.done():
            answer.result()
