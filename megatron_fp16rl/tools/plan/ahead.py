"""Simulates steps whose rollouts run ahead, as rollout/ samples them, with lengths in place of tokens.

A period lies between two weight syncs. The servers sample `ahead` steps' worth of prompts, while the
learner learns a batch. The period ends when that is done, and each leader has its share of the next batch
complete. What still runs is cut: it goes on from its prefix in the next period, under the next weights.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from statistics import fmean

from megatron_fp16rl.rollout.stream import adapted
from megatron_fp16rl.tools.plan.lengths import drawn_lengths


@dataclass(frozen=True)
class Setup:
    """What is simulated; lengths in tokens, times in seconds."""

    ahead: int
    leaders: int
    prompts: int  # of a step, over all leaders
    samples: int
    prompt: float  # every prompt's length
    response: float  # mean; if it is `most`, all have that length
    most: int  # of a response
    servers: int
    room: int  # responses that a server runs at once
    decode_step: Callable[
        [float, float], float
    ]  # of running responses and their tokens in the cache
    prefill: float  # of one token
    learn: float  # of a batch of mean lengths: score and update
    sync: float


@dataclass(frozen=True)
class Simulated:
    """Means of a step; tokens are of responses. totals: of all steps, those that fill the pipeline too."""

    step_s: float
    learner_waits_s: float
    servers_wait_s: float  # of one server, while it has nothing to sample
    learnt: float  # tokens
    dropped: float  # tokens that had become too old
    age: float  # of a token when it is learnt, in versions
    totals: dict[str, int]  # tokens sampled, learnt, dropped and waiting to be learnt


@dataclass(slots=True, eq=False)
class _Group:
    """A prompt's responses; missing: how many are not complete."""

    responses: "list[_Response]"
    missing: int

    @property
    def oldest(self) -> int:
        return min(response.pieces[0][0] for response in self.responses)


@dataclass(slots=True, eq=False)
class _Response:
    group: _Group
    length: int
    pieces: list[tuple[int, int]] = field(default_factory=list)  # version and tokens, oldest first

    @property
    def sampled(self) -> int:
        return sum(tokens for _, tokens in self.pieces)


Stream = list[_Group]  # of a leader: what is begun and not learnt, oldest first


def simulate(setup: Setup, steps: int = 12, seed: int = 0) -> Simulated:
    """Means of `steps` steps, once the pipeline is full."""
    draw = drawn_lengths(setup.response, setup.most, random.Random(seed))
    share, overlaps, warm_up = setup.prompts // setup.leaders, setup.ahead > 0, 3 * setup.ahead + 2
    depth = 1  # steps' worth of prompts in flight
    streams: list[Stream] = [[] for _ in range(setup.leaders)]
    totals = {"sampled": 0, "learnt": 0, "dropped": 0}
    rows: list[tuple[float, ...]] = []
    learn_s = 0.0  # of the batch in hand
    for version in range(steps + warm_up):
        # What is sampled now is learnt by a learner whose weights are of this version, or of the next.
        learner = version + overlaps
        dropped = sum(_drop(stream, learner - setup.ahead, draw) for stream in streams)
        for stream in streams:
            stream += [_begun(setup.samples, draw) for _ in range(share * depth - len(stream))]
        servers = [_Server(queue, version, setup) for queue in _dealt(streams, setup.servers)]
        end, ready = _sample(servers, streams, share, learn_s if overlaps else 0.0)
        if setup.ahead > 1:
            depth = adapted(depth, ready / share, setup.ahead)
        totals["sampled"] += sum(server.cut(end) for server in servers)
        batch = [r for stream in streams for group in _take(stream, share) for r in group.responses]
        learnt = sum(response.length for response in batch)
        waits_s = end - learn_s if overlaps else end
        idle_s = fmean(0.0 if server.running else end - server.clock for server in servers)
        learn_s = (
            setup.learn * (learnt / len(batch) + setup.prompt) / (setup.response + setup.prompt)
        )
        if not overlaps:  # the servers wait for the update as well
            end, idle_s = end + learn_s, idle_s + learn_s
        age = sum((learner - at) * tokens for r in batch for at, tokens in r.pieces) / learnt
        totals["learnt"], totals["dropped"] = totals["learnt"] + learnt, totals["dropped"] + dropped
        rows.append((end + setup.sync, waits_s, idle_s, learnt, dropped, age))
    waiting = (response for stream in streams for group in stream for response in group.responses)
    totals["waiting"] = sum(response.sampled for response in waiting)
    means = [fmean(column) for column in zip(*rows[warm_up:], strict=True)]
    step_s, learner_waits_s, servers_wait_s, learnt_mean, dropped_mean, age = means
    return Simulated(
        step_s, learner_waits_s, servers_wait_s, learnt_mean, dropped_mean, age, totals
    )


def _begun(samples: int, draw: Callable[[], int]) -> _Group:
    group = _Group([], samples)
    group.responses = [_Response(group, draw()) for _ in range(samples)]
    return group


def _drop(stream: Stream, oldest: int, draw: Callable[[], int]) -> int:
    """Draws responses with an older token again; returns the tokens that were dropped."""
    dropped = 0
    for group in stream:
        for response in group.responses:
            if response.pieces and response.pieces[0][0] < oldest:
                dropped += response.sampled
                group.missing += response.sampled == response.length
                response.length, response.pieces = draw(), []
    return dropped


def _dealt(streams: Sequence[Stream], servers: int) -> list[list[_Response]]:
    """What is not complete, the leaders in turn, each prompt to the server with the fewest responses."""
    queues: list[list[_Response]] = [[] for _ in range(servers)]
    loads = [(0, server) for server in range(servers)]
    for group in (group for groups in zip(*streams, strict=True) for group in groups):
        if group.missing:
            load, server = loads[0]
            heapreplace(loads, (load + group.missing, server))
            queues[server] += [r for r in group.responses if r.sampled < r.length]
    return queues


def _sample(
    servers: "list[_Server]", streams: list[Stream], share: int, learn_s: float
) -> tuple[float, int]:
    """Runs the servers until each stream has a share complete and `learn_s` is over.

    Returns that time, and how many prompts every stream had complete after `learn_s`.
    """
    lacking = list(streams)
    ready: int | None = None
    events = [(server.next_at, i) for i, server in enumerate(servers)]
    heapify(events)
    now, complete = learn_s, True
    while True:
        while complete and lacking and sum(not group.missing for group in lacking[-1]) >= share:
            lacking.pop()
        next_at, i = events[0]
        if ready is None and next_at > learn_s:
            ready = min(sum(not group.missing for group in stream) for stream in streams)
        if ready is not None and not lacking and next_at > now:
            return now, ready
        now = max(now, next_at)
        complete = servers[i].finish()
        heapreplace(events, (servers[i].next_at, i))


def _take(stream: Stream, share: int) -> list[_Group]:
    """Takes the complete groups with the oldest tokens out of a stream."""
    complete = sorted((group for group in stream if not group.missing), key=lambda g: g.oldest)
    for group in complete[:share]:
        stream.remove(group)
    return complete[:share]


class _Server:
    """A server in one period. All that runs gets a token in each decode step."""

    def __init__(self, queue: list[_Response], version: int, setup: Setup) -> None:
        self.setup, self.version = setup, version
        self.waiting = deque(queue)
        # By the decode step that is the last one; with a number, and the step after which it began.
        self.running: list[tuple[int, int, _Response, int]] = []
        self.clock, self.steps, self.step_s = 0.0, 0, 0.0
        self.cached = 0.0  # tokens in the cache, less `steps` for each response that runs
        self.sampled = 0
        self._begin()

    def _begin(self) -> None:
        """Admits what there is room for; the next event is the last token of a response."""
        setup, running = self.setup, self.running
        while self.waiting and len(running) < setup.room:
            response = self.waiting.popleft()
            prefix = response.sampled
            # The first response of a prompt fills the cache for the others.
            self.clock += (setup.prompt / setup.samples + prefix) * setup.prefill
            self.cached += setup.prompt + prefix - self.steps
            last = self.steps + response.length - prefix
            heappush(running, (last, len(self.waiting), response, self.steps))
        self.next_at = math.inf
        if running:
            left = running[0][0] - self.steps
            cached = self.cached + len(running) * (self.steps + left / 2)
            self.step_s = setup.decode_step(len(running), cached)
            self.next_at = self.clock + left * self.step_s

    def finish(self) -> bool:
        """The next event; returns whether it completes a group."""
        complete = False
        self.clock, self.steps = self.next_at, self.running[0][0]
        while self.running and self.running[0][0] == self.steps:
            _, _, response, begun = heappop(self.running)
            self.cached -= self.setup.prompt + response.sampled - begun
            response.group.missing -= 1
            complete |= not response.group.missing
            self._give(response, self.steps - begun)
        self._begin()
        return complete

    def cut(self, end: float) -> int:
        """Ends the period, between two events; returns the tokens that were sampled in it."""
        steps = self.steps + max(0, int((end - self.clock) / self.step_s)) if self.running else 0
        for last, _, response, begun in self.running:
            self._give(response, min(steps, last - 1) - begun)
        return self.sampled

    def _give(self, response: _Response, tokens: int) -> None:
        if tokens > 0:
            response.pieces.append((self.version, tokens))
            self.sampled += tokens
