"""Transport `sliced`: every learner rank sends each server rank the parts that it keeps, and no others.

Nothing is gathered, nothing is sent to who would drop it, and every rank's network card works. `loader`
is the other end.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.models.parts import Course, Part, messages, rounds, uncovered
from megatron_fp16rl.models.spec import served_dtype
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import Sync
from megatron_fp16rl.rollout.client import Client, ServerError
from megatron_fp16rl.rollout.server import LOADER
from megatron_fp16rl.rollout.weight_sync import wire
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed, Weights
from megatron_fp16rl.rollout.weight_sync.group import Answers, Group, finish
from megatron_fp16rl.rollout.weight_sync.loader import shapes_of

_MESSAGES, _FEWEST_BYTES = 8, 1 << 20

T = TypeVar("T")


class SlicedTransport:
    """This rank's end: it sends what it offers, if it offers anything. Rank 0 also commands the servers."""

    def __init__(
        self, settings: Sync, ranks_per_server: int, host: str, dtype: torch.dtype, world: World
    ) -> None:
        """host: address of rank 0 that the servers can reach. dtype: the servers'."""
        platform.current().prepare_sglang()
        self.timeout_s, self.ranks_per_server = settings.timeout_s, ranks_per_server
        self.host, self.served, self.world = host, dtype, world
        # Two messages are held at a time: one is packed while the other is on its way.
        self.limit = settings.message_bytes
        self.alone = platform.current().SENT_ALONE
        self.group: Group | None = None  # of rank 0 and all servers, for commands
        self.wires: wire.Wires | None = None
        self.servers = 0
        self.number: int | None = None  # of this rank among the senders
        self.order: list[int] = []  # of the messages: to which rank of a server
        self.size = 0  # bytes of an update to each server

    def send(self, weights: Weights, version: str, servers: Sequence[Client]) -> int:
        """See Transport."""
        # 1. Before the first byte: a server that has taken half of the weights cannot go back.
        weights.check()
        # 2. A group of rank 0 and exactly these servers, kept from sync to sync. It opens an update on
        #    each: what SGLang repacked after loading is brought back into its loadable shape.
        if self._on_rank0(lambda: self._open(servers)):
            # 3. For new servers, a plan: what each learner rank has, and what each server rank wants.
            self._plan(weights)
        # 4. All senders and all server ranks, at the same time. The servers' weights are undefined from
        #    here on, and their version says so.
        self._everywhere(lambda: self._stream(weights, f"{version}-partial"))
        # 5. Every sender has finished: only now the servers call the weights by the new version.
        self._on_rank0(lambda: self._finish(version))
        return self.size

    def alive(self, servers: Sequence[Client]) -> list[Client]:
        """See Transport. Whoever waited for a message has given up by now, with this rank."""
        if self.wires is not None:
            self.wires.abandon()
        group, self.group, self.wires = self.group, None, None
        if group is None:
            return [server for server in servers if server.responds]
        return group.abandon(servers)

    def close(self) -> None:
        """See Transport."""
        if self.wires is not None:
            self.wires.abandon()
        group, self.group, self.wires = self.group, None, None
        if group is not None:
            group.leave(group.servers)

    def _open(self, servers: Sequence[Client]) -> bool:
        """Opens an update on all servers; whether they are others than the last time."""
        is_new = self.group is None or list(servers) != self.group.servers
        if is_new:
            if self.group is not None:
                self.group.leave([server for server in self.group.servers if server in servers])
            # Assigned before it forms: after a failure `alive` must abandon it.
            self.group = Group(servers, self.ranks_per_server, self.host, self.timeout_s)
            self.group.form()
        assert self.group is not None
        finish(self.group.post_all("/begin_weight_update"))
        return is_new

    def _plan(self, weights: Weights) -> None:
        """Exchanges offers and wants, from which each end knows all messages. Collective."""
        if self.wires is not None:
            self.wires.abandon()
        offers = [wire.parts_of(rows) for rows in self.world.gather(wire.listed(weights.parts))]
        senders = [rank for rank, parts in enumerate(offers) if parts]
        offers = [offers[rank] for rank in senders]
        name, port, servers, limit, wants, self.size = self._on_rank0(lambda: self._wants(offers))
        self._everywhere(lambda: self._connect(name, port))
        self.servers, self.number = servers, None
        if self.world.rank in senders:
            self.number = senders.index(self.world.rank)
            mine = offers[self.number]
            outgoing = [
                messages(mine, wire.parts_of(rows), limit, self.dtype, self.alone) for rows in wants
            ]
            ways = max(len(senders), self.ranks_per_server)
            order = rounds([len(to_rank) for to_rank in outgoing], self.number, ways)
            self.order = [rank for rank, _ in order]
            in_order = [outgoing[rank][number] for rank, number in order]
            self.course = Course(in_order, 0, self.dtype, platform.current().device())

    def _wants(self, offers: list[list[Part]]) -> tuple[str, int, int, int, list[Any], int]:
        """The group's name, its store's port, the number of servers, the bytes of a message at most, the
        wants of each rank of a server, and how many bytes these are.
        """
        group = self.group
        assert group is not None
        self._connect(group.name, group.port)
        assert self.wires is not None
        store = self.wires.store
        wire.write_json(store, "offers", [wire.listed(parts) for parts in offers])
        dtype = str(self.served).removeprefix("torch.")
        # Of a small model, messages are shorter: the first is unpacked while others are on their way.
        size = sum(part.numel for of_sender in offers for part in of_sender) * self.served.itemsize
        limit = min(self.limit, max(_FEWEST_BYTES, size // (_MESSAGES * self.ranks_per_server)))
        count = self.ranks_per_server
        self._done(self._command("plan", ranks=count, limit=limit, alone=self.alone, dtype=dtype))
        ranks = range(count)
        for rank in ranks:
            digests = {store.get(f"digest/{server}/{rank}") for server in range(len(group.servers))}
            if len(digests) > 1:
                raise SyncFailed(f"ranks {rank} of the servers do not want the same weights")
        wants = [wire.read_json(store, f"wants/{rank}") for rank in ranks]
        parts = [wire.parts_of(rows) for rows in wants]
        offered = [part for of_sender in offers for part in of_sender]
        for of_rank in parts:
            if bad := uncovered(offered, of_rank):
                raise SyncFailed(f"no learner rank, or several, have all of {', '.join(bad[:5])}")
        unwanted = set(shapes_of(offers)) - {part.name for of_rank in parts for part in of_rank}
        if unwanted:
            raise SyncFailed(
                f"SGLang's loader takes nothing of {', '.join(sorted(unwanted)[:5])}; set "
                "sync.transport: distributed"
            )
        size = sum(part.numel * self.dtype(part.name).itemsize for rank in parts for part in rank)
        return group.name, group.port, len(group.servers), limit, wants, size

    def _connect(self, name: str, port: int) -> None:
        """Opens this rank's connection to the store of a control group of that name, if it has none."""
        if self.wires is None or self.wires.control != name:
            self.wires = wire.Wires(name, wire.connect(self.host, port, self.timeout_s))

    def _stream(self, weights: Weights, version: str) -> None:
        """Sends this rank's messages; on rank 0, has the servers receive all of them."""
        assert self.wires is not None
        if not self.world.is_rank0:
            if self.number is not None:
                self.wires.watched(lambda: self._send(weights), self.timeout_s, "sending weights")
            return
        receiving = self._command(
            *("receive", version),
            servers=self.servers,
            ranks=self.ranks_per_server,
            timeout_s=self.timeout_s,
        )

        def look() -> None:
            for answer in receiving.values():  # a server that refuses receives nothing
                if answer.done():
                    answer.result()

        def work() -> None:
            self._send(weights)
            finish(receiving)

        self.wires.watched(work, self.timeout_s, "sending weights", look)
        self.wires.check()

    def _send(self, weights: Weights) -> None:
        """Sends this rank's messages in order; each is packed while the one before is on its way."""
        assert self.wires is not None
        if self.number is None:
            return
        groups = [
            self.wires.group(self.number, rank, 0, 1 + self.servers, self.timeout_s)
            for rank in range(self.ranks_per_server)
        ]
        self.course.prepare(weights.memory)
        works: list[dist.Work | None] = [None, None]
        for turn, rank in enumerate(self.order):
            if (work := works[turn % 2]) is not None:
                work.wait()  # the last but one, whose memory is used again
            flat = self.course.pack(turn, weights.tensor)
            works[turn % 2] = dist.broadcast(flat, group=groups[rank], group_src=0, async_op=True)
        for work in works:
            if work is not None:
                work.wait()
        if self.course.device.type == "cuda":  # there `wait` returns before a broadcast has ended
            torch.cuda.synchronize(self.course.device)

    def _finish(self, version: str) -> None:
        """Names the version on all servers, and closes the update: they repack their weights."""
        group = self.group
        assert group is not None
        # The cache holds what was computed with older weights. A server that still answers a request
        # cannot flush it: it refuses, and does not get the version's name.
        self._done(self._command("finish", version, flush=True))
        finish(group.post_all("/end_weight_update"))

    def _command(
        self, do: str, version: str | None = None, flush: bool = False, **arguments: Any
    ) -> Answers:
        """Has every rank of every server do something; see loader.Receiver."""
        from sglang.srt.utils import MultiprocessingSerializer

        assert self.group is not None
        assert self.wires is not None
        wire.write_json(self.wires.store, "command", {"do": do, **arguments})
        nothing = MultiprocessingSerializer.serialize([], output_str=True)
        return self.group.post_all(
            "/update_weights_from_tensor",
            lambda _: {
                "serialized_named_tensors": [nothing] * self.ranks_per_server,
                "load_format": LOADER,
                "flush_cache": flush,
                "weight_version": version,
            },
        )

    def _done(self, answers: Answers) -> None:
        """Waits for a command; raises what a server refused with, or what its loader failed with."""
        finish(answers)
        assert self.wires is not None
        self.wires.check()

    def _on_rank0(self, work: Callable[[], T]) -> T:
        """The result of `work` on rank 0, on every rank; raises SyncFailed on all if it fails."""
        result, failure = None, None
        if self.world.is_rank0:
            try:
                result = work()
            except (ServerError, SyncFailed, dist.DistError) as error:
                failure = str(error)
        # After the except block: the error's traceback keeps the store alive in which servers wait.
        result, failure = self.world.broadcast_from_rank0((result, failure))
        if failure is not None:
            raise SyncFailed(failure)
        return result  # type: ignore[return-value]

    def _everywhere(self, work: Callable[[], None]) -> None:
        """Runs `work` on every rank; raises SyncFailed on all if it fails on any."""
        failure = None
        try:
            work()
        except (ServerError, SyncFailed, dist.DistError) as error:
            failure = str(error)
        failures = [text for text in self.world.gather(failure) if text is not None]
        if failures:
            raise SyncFailed(failures[0])

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor travels."""
        return served_dtype(name, self.served)
