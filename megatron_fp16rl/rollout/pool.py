"""Several servers as one: work goes to whoever is free, and away from who is gone.

Each data-parallel leader deals its own requests. A router in between would balance as well, but it knows
nothing of weight versions: a server that came back with old weights must not be asked.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_fp16rl.models.families import Routing
from megatron_fp16rl.rollout.client import Client, Generation, Sampling, ServerLost
from megatron_fp16rl.rollout.discovery import Endpoint

# A server has so many requests under way, of so many that are its even share: the rest goes to
# whoever is done first. A request is done when its longest response is: with few large ones the rest
# would come late, and be a second wave. One server alone gets everything at once, which it batches best.
UNDER_WAY, SHARE = 24, 32


class NoServers(RuntimeError):
    """Every server that has the weights is gone; work is left undone."""


@dataclass(frozen=True)
class _Job:
    """Prompts `start` to `end` of one call."""

    start: int
    end: int


class Pool:
    """Servers that have the weights that were published last. Generates as one Client does.

    What was generated is kept until `forget`: the same calls made again, after NoServers, ask only
    for what is missing. So no sample is drawn twice.
    """

    def __init__(self, timeout_s: float, begin: float = 0.0) -> None:
        """begin: the server that is dealt to first, as a share of all: leaders differ in it."""
        self.timeout_s, self._begin = timeout_s, begin
        self.clients: list[Client] = []
        self.resent = 0  # requests that another server had to answer, since `forget`
        self._kept: dict[tuple[int, int], Generation] = {}
        self._calls = 0

    def join(self, endpoints: Sequence[Endpoint]) -> None:
        """Takes these servers in place of those before."""
        known = {client.endpoint: client for client in self.clients}
        self.clients = [known.get(e) or Client(e, self.timeout_s) for e in endpoints]

    def again(self) -> None:
        """The calls since `forget` are about to be made again, in the same order."""
        self._calls = 0

    def forget(self) -> None:
        """Drops what was generated: the next calls are new ones."""
        self._kept, self._calls, self.resent = {}, 0, 0

    def lose(self, client: Client, why: Exception) -> None:
        """Asks a server no more, until the next `join`."""
        if client in self.clients:
            self.clients.remove(client)
            print(f"rollout server {client.url} is lost: {why}", flush=True)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int] | None = None,
        routing: Routing | None = None,
    ) -> list[Generation]:
        """As Client.generate. Raises NoServers if no server is left, ServerError for a wrong request."""
        call, self._calls = self._calls, self._calls + 1
        missing = [i for i in range(len(prompts)) if (call, i) not in self._kept]
        jobs = deque(self._cut(missing))
        if jobs and not self.clients:
            raise NoServers("no rollout server is left")
        lock, failures = threading.Lock(), []

        def serve(client: Client) -> None:
            while not failures:
                with lock:
                    if not jobs or client not in self.clients:
                        return
                    job = jobs.popleft()
                mine = missing[job.start : job.end]
                try:
                    answers = client.generate(
                        [prompts[i] for i in mine],
                        sampling,
                        seeds and [seeds[i] for i in mine],
                        routing,
                    )
                except ServerLost as error:
                    with lock:
                        jobs.append(job)
                        self.resent += 1
                        self.lose(client, error)
                    return
                except Exception as error:
                    failures.append(error)
                    return
                with lock:
                    self._kept.update(((call, i), a) for i, a in zip(mine, answers, strict=True))

        while jobs and self.clients and not failures:
            first = int(self._begin * len(self.clients))
            dealt = self.clients[first:] + self.clients[:first]
            hands = dealt * UNDER_WAY  # in turn: there may be fewer jobs than hands
            with ThreadPoolExecutor(len(hands), "rollout") as threads:
                list(threads.map(serve, hands))
        if failures:
            raise failures[0]
        if jobs:
            raise NoServers(f"no rollout server is left; {len(jobs)} requests are unanswered")
        return [self._kept[call, i] for i in range(len(prompts))]

    def _cut(self, prompts: list[int]) -> list[_Job]:
        servers = len(self.clients)
        size = len(prompts)
        if servers > 1:
            size = max(1, -(-len(prompts) // (servers * SHARE)))
        return [
            _Job(start, min(start + size, len(prompts)))
            for start in range(0, len(prompts), max(1, size))
        ]
