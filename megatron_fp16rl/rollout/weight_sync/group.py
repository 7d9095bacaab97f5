"""The process group over which weights are broadcast: this process, as rank 0, and every server's ranks.

NCCL is less forgiving than gloo. It builds its communicator in the first broadcast, and waits there for
all ranks without a deadline; its destroy waits for running operations, and for the other ranks of a node
to leave as well. So every operation is watched: it has a deadline, ends as soon as a server refuses, and
runs in a daemon thread if it may never return.
"""

import datetime
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed
from megatron_fp16rl.utils import tcp_store
from megatron_fp16rl.utils.processes import free_port

_POLL_S = 0.0005
# How long SGLang 0.5.23 looks for a rendezvous, and does nothing else then: torch's default.
_RENDEZVOUS_S = 1800
_ABORT_S = 5  # how long an abort is waited for
# NCCL's watchdog must not fire before our deadline, whose error names the servers that are late.
_NCCL_TIMEOUT_FACTOR = 10

NAME = "fp16rl-weights-"  # how the names of these groups begin

T = TypeVar("T")
Answers = dict[str, "Future[Any]"]  # by the server's URL


class Group:
    """Formed once, used, and left or abandoned. Other servers need another group."""

    def __init__(
        self, servers: Sequence[Client], ranks_per_server: int, host: str, timeout_s: float
    ) -> None:
        """host: address of this process, for the servers. timeout_s: of each operation."""
        self.servers, self.ranks_per_server = list(servers), ranks_per_server
        self.host, self.timeout_s = host, timeout_s
        self.name = f"{NAME}{secrets.token_hex(4)}"
        self.port = free_port(host)  # of the store in which all meet, on this machine
        self._handle: dist.ProcessGroup | None = None

    def form(self) -> None:
        """Rendezvous of all ranks. Raises SyncFailed, and what a server answered."""
        world_size = 1 + self.ranks_per_server * len(self.servers)
        backend = platform.current().COLLECTIVES
        joining = self.post_all(
            "/init_weights_update_group",
            lambda i: {
                "master_address": self.host,
                "master_port": self.port,
                "rank_offset": 1 + i * self.ranks_per_server,
                "world_size": world_size,
                "group_name": self.name,
                "backend": backend,
            },
        )
        self._handle = self._watched(
            lambda: self._rendezvous(backend, self.port, world_size), joining, "meeting the servers"
        )
        finish(joining)

    def post_all(self, path: str, body: Callable[[int], dict[str, Any]] = lambda _: {}) -> Answers:
        """POSTs to all servers at once. body: of each, by its number."""
        return self._post(self.servers, path, body)

    def broadcast(self, tensor: torch.Tensor, receiving: Answers) -> None:
        """Sends a tensor to all ranks; `receiving`: the requests to receive it. Raises as `form`."""

        def send() -> None:
            work = dist.broadcast(tensor, group=self._handle, group_src=0, async_op=True)
            while not work.is_completed():  # on a GPU `wait` alone returns before it has completed
                time.sleep(_POLL_S)
            work.wait()

        self._watched(send, receiving, f"a broadcast of {tensor.nbytes} bytes")

    def leave(self, remaining: Sequence[Client]) -> None:
        """Leaves together with the servers of the group that are still alive. Raises as `form`.

        They get the request before this process leaves, and answer when they have left: a rank that
        leaves alone may wait for the others (NCCL's user guide on ncclCommDestroy).
        """
        handle, self._handle = self._handle, None
        if handle is None:
            return
        complete = list(remaining) == self.servers
        leaving = self._post(
            remaining, "/destroy_weights_update_group", lambda _: {"group_name": self.name}
        )

        def destroy() -> None:
            # A member that is gone cannot take part in a destroy.
            dist.destroy_process_group(handle) if complete else abort(handle)
            finish(leaving)

        self._watched(destroy, leaving, "leaving the servers' last group")

    def abandon(self, servers: Sequence[Client]) -> list[Client]:
        """Leaves alone, after a failure; with gloo this frees the servers that wait in the group.

        Returns those of `servers` that are free. A hung one is not, nor one that waits for a hung one until
        its supervisor kills that: both come back as servers that need weights.
        """
        handle, self._handle = self._handle, None
        if handle is not None:
            wait([in_thread(lambda: abort(handle))], timeout=_ABORT_S)

        def end(server: Client) -> "Future[bool]":
            return in_thread(lambda: server.abort_weight_update(self.name, _ABORT_S))

        ended = [end(server) for server in servers]  # all at once
        return [server for server, done in zip(servers, ended, strict=True) if done.result()]

    def _rendezvous(self, backend: str, port: int, world_size: int) -> dist.ProcessGroup:
        # The import takes seconds: the servers import it meanwhile as well.
        from sglang.srt.utils import init_custom_process_group

        timeout_s = self.timeout_s * (_NCCL_TIMEOUT_FACTOR if backend == "nccl" else 1)
        try:
            store = tcp_store.open_store(self.host, port, world_size, True, self.timeout_s)
        except (RuntimeError, OSError):
            # A server that comes too late would look for the store, and do nothing else meanwhile.
            in_thread(
                lambda: tcp_store.release_latecomers(self.host, port, world_size, _RENDEZVOUS_S)
            )
            raise
        with nccl.without_watchdog():
            return init_custom_process_group(
                backend=backend,
                store=dist.PrefixStore(self.name, store),  # the prefix that SGLang's ranks use
                world_size=world_size,
                rank=0,
                group_name=self.name,
                timeout=datetime.timedelta(seconds=timeout_s),
            )

    def _post(
        self, servers: Sequence[Client], path: str, body: Callable[[int], dict[str, Any]]
    ) -> Answers:
        def post(server: Client, content: dict[str, Any]) -> "Future[Any]":
            return in_thread(lambda: server.post(path, content, True, self.timeout_s))

        return {server.url: post(server, body(i)) for i, server in enumerate(servers)}

    def _watched(self, work: Callable[[], T], answers: Answers, what: str) -> T:
        """The result of `work`, an operation in which the servers take part before they answer."""
        running = in_thread(work)
        deadline = time.monotonic() + self.timeout_s
        while not running.done():
            wait([running], timeout=_POLL_S)
            for answer in answers.values():  # a server that refuses never takes part: raise it now
                if answer.done():
                    answer.result()
            if time.monotonic() > deadline:
                silent = ", ".join(url for url, answer in answers.items() if not answer.done())
                raise SyncFailed(
                    f"{what} took more than {self.timeout_s:g} s (sync.timeout_s); "
                    f"no answer from {silent or 'nobody: all have answered'}"
                )
        try:
            return running.result()
        except (RuntimeError, OSError) as error:  # the types of gloo, NCCL and torch's store
            raise SyncFailed(f"{what} broke off: {error}") from error
        finally:
            del running  # it holds the error, whose frames hold the store in which servers wait


def abort(handle: dist.ProcessGroup) -> None:
    """Leaves a group in which an operation may never end; that operation fails."""
    if platform.current().COLLECTIVES == "nccl":
        dist.distributed_c10d._abort_process_group(handle)
    else:
        dist.destroy_process_group(handle)


def finish(answers: Answers) -> None:
    """Waits for all answers; raises what a server refused with."""
    for answer in answers.values():
        answer.result()


def in_thread(work: Callable[[], T]) -> "Future[T]":
    """Runs `work` in a daemon thread: the end of the process does not wait for it."""
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(work, future), name="sync", daemon=True).start()
    return future


def _run(work: Callable[[], T], future: "Future[T]") -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
        del future  # a cycle would keep the error alive, and what its frames hold
    else:
        future.set_result(result)
