"""Load-balances requests over servers and re-routes around failures.

Each data-parallel leader has a pool of its own. A router between learner and servers would balance as
well, but it knows nothing of weight versions: a server that came back with old weights must get no
request before the next publish.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_fp16rl.models.spec import Routing
from megatron_fp16rl.rollout.client import Client, Generation, Sampling, ServerLost
from megatron_fp16rl.rollout.discovery import Endpoint

# Each server has IN_FLIGHT requests at once; a request is 1/CHUNKS of a server's even share, so fast
# servers take more. A request is done when its longest response is: with few large requests the last
# ones would start late. A single server gets everything in one request, which it batches best.
IN_FLIGHT, CHUNKS = 24, 32


class NoServers(RuntimeError):
    """No server with the published weights is left; requests are unanswered."""


class Pool:
    """Servers that have the weights published last. Generates as one Client does.

    Responses are kept until `clear`. After NoServers the caller publishes again and repeats its
    calls in the same order: only missing responses are requested, so no sample is drawn twice. (A prompt
    that is another one then, because an environment said something else, is requested.)
    """

    def __init__(self, timeout_s: float, offset: float = 0.0) -> None:
        """offset: in [0, 1), where this leader starts in the list of servers: not all at server 0."""
        self.timeout_s, self._offset = timeout_s, offset
        self.clients: list[Client] = []
        self.resent = 0  # requests that another server had to answer, since `clear`
        # By call, and prompt in the call.
        self._responses: dict[tuple[int, int], tuple[list[int], Generation]] = {}
        self._calls = 0

    def set_servers(self, endpoints: Sequence[Endpoint]) -> None:
        """Uses these servers instead of the previous ones."""
        known = {client.endpoint: client for client in self.clients}
        self.clients = [known.get(e) or Client(e, self.timeout_s) for e in endpoints]

    def remove(self, client: Client, error: Exception) -> None:
        """Sends no more requests to a server, until the next `set_servers`."""
        if client in self.clients:
            self.clients.remove(client)
            print(f"rollout server {client.url} is lost: {error}", flush=True)

    def in_turn(self) -> list[Client]:
        """The servers, from this leader's first one on."""
        first = int(self._offset * len(self.clients))
        return self.clients[first:] + self.clients[:first]

    def replay(self) -> None:
        """The caller is about to repeat its calls since `clear`."""
        self._calls = 0

    def clear(self) -> None:
        """Drops the kept responses: the next calls are new ones."""
        self._responses, self._calls, self.resent = {}, 0, 0

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling | list[Sampling],
        seeds: list[int] | None = None,
        routing: Routing | None = None,
    ) -> list[Generation]:
        """As Client.generate. Raises NoServers if no server is left, ServerError for a wrong request."""
        call, self._calls = self._calls, self._calls + 1
        known = self._responses
        missing = [
            i for i, ids in enumerate(prompts) if (call, i) not in known or known[call, i][0] != ids
        ]
        chunks = deque(chunked(missing, len(self.clients)))
        lock = threading.Lock()
        failures: list[Exception] = []

        def work(client: Client) -> None:
            """Takes chunks until there are none, or the server is lost."""
            while not failures:
                with lock:
                    if not chunks or client not in self.clients:
                        return
                    chunk = chunks.popleft()
                try:
                    answers = client.generate(
                        [prompts[i] for i in chunk],
                        [sampling[i] for i in chunk] if isinstance(sampling, list) else sampling,
                        seeds and [seeds[i] for i in chunk],
                        routing,
                    )
                except ServerLost as error:  # another server answers the chunk
                    with lock:
                        chunks.append(chunk)
                        self.resent += 1
                        self.remove(client, error)
                    return
                except Exception as error:  # the request itself is wrong: no server would answer it
                    failures.append(error)
                    return
                with lock:
                    known.update(
                        ((call, i), (prompts[i], answer))
                        for i, answer in zip(chunk, answers, strict=True)
                    )

        while chunks and self.clients and not failures:
            # Round-robin: with fewer chunks than workers every server still gets some.
            workers = self.in_turn() * IN_FLIGHT
            with ThreadPoolExecutor(len(workers), "rollout") as threads:
                list(threads.map(work, workers))
        if failures:
            raise failures[0]
        if chunks:
            raise NoServers(f"no rollout server is left; {len(chunks)} requests are unanswered")
        return [known[call, i][1] for i in range(len(prompts))]

    def score(
        self, sequences: list[list[int]], routing: Routing | None
    ) -> list[tuple[list[float], torch.Tensor | None]]:
        """As Client.score_with_experts, by the first server that answers. Raises NoServers."""
        while self.clients:
            client = self.clients[int(self._offset * len(self.clients))]
            try:
                return client.score_with_experts(sequences, routing)
            except ServerLost as error:
                self.remove(client, error)
        raise NoServers("no rollout server is left to score sequences")


def chunked(prompts: list[int], servers: int) -> list[list[int]]:
    """The prompts of each request."""
    size = len(prompts) if servers <= 1 else -(-len(prompts) // (servers * CHUNKS))
    return [prompts[i : i + size] for i in range(0, len(prompts), max(1, size))]
