"""Publishes the learner's weights to the servers that are alive, and verifies them there."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from megatron_fp16rl.data.batch import Batch, ScoredBatch
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import Dtype
from megatron_fp16rl.rollout.client import ServerLost
from megatron_fp16rl.rollout.discovery import Discovery, Endpoint
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed, Transport, Weights
from megatron_fp16rl.utils.errors import FinalError

MAX_PUBLISH_TRIES = 3  # servers that make one fail are excluded from the next if there are others
# Observed mean |dlogp| between the engines is 10-100x below these limits; wrong weights give > 1.
_ROUNDING = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}


class ServersGone(FinalError):
    """No rollout server came up, or back, in time."""


class SyncMismatch(FinalError):
    """The servers do not compute what the learner computes."""


class Publisher:
    """Keeps the servers on the learner's weights. Every method is collective over the learner's ranks.

    Servers may die and come back. Those that have the weights are the members: the same on all ranks,
    and the servers of each leader's pool. A server that comes back joins at the next publish.
    """

    def __init__(
        self,
        world: World,
        transport: Transport,
        discovery: Discovery,
        pool: Pool,
        waiting: Callable[[float], AbstractContextManager[Any]],
    ) -> None:
        """discovery: used on rank 0 only. waiting: see Rollouts."""
        self.world, self.transport, self.discovery = world, transport, discovery
        self.pool, self.waiting = pool, waiting
        self.version: int | None = None
        self._weights: Weights | None = None

    @property
    def members(self) -> list[Endpoint]:
        """The servers that have the weights."""
        return self.discovery.members

    def publish(self, weights: Weights, version: int) -> int:
        """See RolloutSource. Raises ServersGone on all ranks."""
        self._weights, self.version, self.discovery.excluded = weights, version, []
        for _ in range(MAX_PUBLISH_TRIES):
            endpoints = self._find_servers()
            sent, failure = self._send(endpoints)
            if failure is None:
                self._admit(endpoints)
                return sent
        raise ServersGone(
            f"weights of version {version} could not be sent in {MAX_PUBLISH_TRIES} tries; "
            f"the last: {failure}"
        )

    def republish(self, version: int) -> None:
        """Sends the learner's present weights, which are `version`, to the servers that are alive now."""
        assert self._weights is not None
        self.discovery.unsure = True
        self.publish(self._weights, version)

    def has_new_servers(self) -> bool:
        return self.world.broadcast_from_rank0(self.world.is_rank0 and self.discovery.has_new())

    def _find_servers(self) -> list[Endpoint]:
        """The servers to publish to, the same on every rank."""
        is_rank0 = self.world.is_rank0
        endpoints = self.world.broadcast_from_rank0(self.discovery.ready() if is_rank0 else None)
        if endpoints is None:
            # On all ranks, so that no watchdog reports rank 0's wait as a hang.
            with self.waiting(self.discovery.timeout_s):
                endpoints = self.world.broadcast_from_rank0(
                    self.discovery.wait() if is_rank0 else None
                )
        if not endpoints:
            raise ServersGone(
                f"no rollout server is registered in {self.discovery.folder}; see logs/ for why "
                "they ended"
            )
        return endpoints

    def _send(self, endpoints: list[Endpoint]) -> tuple[int, str | None]:
        """One try: the bytes sent to each server, and why it failed if it did."""
        assert self._weights is not None
        sent, failure = 0, None
        if self.world.is_rank0:
            self.pool.set_servers(endpoints)
        clients = list(self.pool.clients) if self.world.is_rank0 else []
        try:
            sent = self.transport.send(self._weights, str(self.version), clients)
        except SyncFailed as error:
            failure = str(error)
        # Only after the except block: the error's traceback keeps the store alive in which servers
        # wait for others.
        if failure is not None:
            alive = self.transport.alive(clients)
            lost = [client.endpoint for client in clients if client not in alive]
            self.discovery.excluded += lost  # until the next publish
            if self.world.is_rank0:
                print(
                    f"publishing version {self.version} failed: {failure}\nto be tried again "
                    f"with {len(alive)} server(s), without {len(lost)}",
                    flush=True,
                )
        return sent, failure

    def _admit(self, endpoints: list[Endpoint]) -> None:
        discovery = self.discovery
        if self.world.is_rank0 and discovery.members and len(endpoints) != len(discovery.members):
            of = f"{len(endpoints)} of {discovery.settings.servers} servers"
            print(f"version {self.version} is on {of}", flush=True)
        discovery.members, discovery.unsure = endpoints, False
        self.pool.set_servers(endpoints)

    def verify(
        self,
        score: Callable[[Batch, float], ScoredBatch],
        sequences: list[list[int]],
        dtypes: Sequence[Dtype],
    ) -> float | None:
        """Compares every server's log-probs of `sequences` with those of `score`, Learner.score.

        Returns the mean |difference| in nats of the worst server, None if all servers were lost
        meanwhile. Raises SyncMismatch where it is more than the rounding of `dtypes` explains.
        """
        batch = Batch.from_token_ids(sequences).to(self.world.device)
        learnt = score(batch, 1.0).pi[batch.mask].tolist()
        differences: list[float] = []
        for client in list(self.pool.clients) if self.world.is_rank0 else []:
            try:
                served = [logprob for row in client.score(sequences) for logprob in row]
            except ServerLost as error:
                self.pool.remove(client, error)
                continue
            apart = [abs(a - b) for a, b in zip(served, learnt, strict=True)]
            differences.append(sum(apart) / len(apart))
        difference = self.world.broadcast_from_rank0(largest(differences))
        if difference is None:
            return None
        limit = max(_ROUNDING[dtype] for dtype in dtypes)
        if not difference <= limit:  # NaN as well
            raise SyncMismatch(
                f"after publishing version {self.version} the servers' log-probs differ from the "
                f"learner's by {difference:.3g} nats on average; rounding explains {limit:g}. The "
                "servers do not run the learner's weights: check sync.transport and the model family"
            )
        return difference


def largest(differences: Sequence[float]) -> float | None:
    """NaN if one of them is, which max() may pass over; None if there are none."""
    return max(differences, key=lambda apart: (math.isnan(apart), apart), default=None)
