"""Samples without a pause, up to `rollout.ahead` steps before the samples are learnt.

A step's batch is the first prompts of which all responses are complete. The others go on under the next
weights (see `responses`), so a long response holds up no step. No token is learnt that is more than
`rollout.ahead` versions old: a response that would be is dropped and drawn again from its prompt.

Samples of an environment come from a stream at any `rollout.ahead`: while one waits for its environment, the
servers sample others. With 0 or 1 its batch is the prompts of a step, and nothing is left in flight.

One stream runs in each data-parallel leader. It speaks HTTP and takes part in no collective.
"""

import asyncio
import functools
import uuid
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.rollout.background import Background
from megatron_fp16rl.rollout.client import Client, ServerLost, event_loop_session
from megatron_fp16rl.rollout.collector import Collected, Collector, check_version, purpose_of
from megatron_fp16rl.rollout.grading import grade
from megatron_fp16rl.rollout.pool import NoServers
from megatron_fp16rl.rollout.recording import write_samples
from megatron_fp16rl.rollout.responses import Group, Response
from megatron_fp16rl.rollout.turns import Turns
from megatron_fp16rl.utils.files import read_json, write_json
from megatron_fp16rl.utils.tasks import cancelled, landed, together

STREAM_FILES = "stream.leader_*.json"  # that `save` writes
_ABORT_TIMEOUT_S, _ABORTS_AT_ONCE = 30, 16  # to each server
_ABORT_AGAIN_S = 0.5  # a request that was on its way when it was aborted is aborted once more


class Stream:
    """Prompts of one data-parallel rank: begun, complete, and those that come next."""

    def __init__(self, collector: Collector, steps: int) -> None:
        """collector: of the same rank, whose settings and servers are used. steps: of the whole run."""
        self.collector, self.steps = collector, steps
        self.settings, self.task, self.pool = collector.settings, collector.task, collector.pool
        self.rank, settings, task = collector.rank, collector.settings, collector.task
        self.share = settings.prompts // collector.size
        first = self.rank * self.share
        self._own = range(first, first + self.share)  # indices in every step
        self._begun: list[Group] = []
        self._complete: list[Group] = []  # and graded
        self._next: deque[tuple[int, int]] = deque()  # (step, index) of prompts that come next,
        self._step: int | None = None  # and then all of this step and of those after it
        count = settings.prompts * (1 + settings.refill_rounds)
        # Of a step, with those that may replace them; prompts of about so many steps are in flight.
        self._prompts = functools.lru_cache(maxsize=2 * max(1, settings.ahead))(
            lambda step: task.training_prompts(step, count)
        )
        self._grader = Background("rewards")
        self._turns = Turns(task, settings.max_new_tokens) if task.environment else None
        self._running: dict[str, Client] = {}  # who samples the responses of these names
        self._is_stopped = False  # what runs is to be aborted, and not requested again
        self._tally, self._counts = GradingStats(), Counter[str]()  # since the last batch
        # Steps' worth of prompts in flight. `ahead` is a bound: more than the learner needs to find its batch
        # complete would only be older when it is learnt.
        self._depth = 1
        self.ready = 0  # prompts that were complete when the learner was ready for the last batch

    def collect(self, step: int, version: int, learnt: int, stop: "Future[None]") -> Collected:
        """The next batch, once `stop` is set and enough is complete; what is begun is kept for later.

        version: of the weights that all servers have. learnt: the newest that the learner may have when it
        learns the batch. Raises NoServers; called again, it requests only what is missing.
        """
        self._drop_older_than(learnt - self.settings.ahead)
        self._begin(step)
        asyncio.run(self._sample(version, stop))
        return self._take(step)

    def adapt(self, ready: int) -> None:
        """ready: the least of all leaders. One leader that lacks a prompt makes all of them wait."""
        self._depth = adapted(self._depth, ready / self.share, max(1, self.settings.ahead))

    def save(self, folder: Path) -> None:
        """Writes what is begun, for `restore`."""
        if self._step is None:
            return
        groups = self._begun + self._complete
        values = {
            "own": [self._own.start, self._own.stop],
            "step": self._step,
            "next": list(self._next),
            "depth": self._depth,
            "groups": [group.to_json() for group in groups],
        }
        write_json(folder / STREAM_FILES.replace("*", str(self.rank)), values)

    def restore(self, folder: Path) -> None:
        """Takes this rank's prompts of what `save` wrote, at whatever number of leaders."""
        saved = [read_json(file) for file in sorted(folder.glob(STREAM_FILES))]
        if not saved:
            return
        self._depth = max(values["depth"] for values in saved)
        # One leader may be further in the order of prompts than another.
        self._step = max(values["step"] for values in saved)
        waiting = []
        for values in saved:
            waiting += [(step, index) for step, index in values["next"]]
            steps = range(values["step"], self._step)
            waiting += [(step, index) for step in steps for index in range(*values["own"])]
            for group in values["groups"]:
                if group["index"] in self._own:
                    self._restore(group)
        self._next = deque(sorted(place for place in waiting if place[1] in self._own))

    def _restore(self, values: dict[str, Any]) -> None:
        group = Group.from_json(values)
        (self._begun if group.ungraded else self._complete).append(group)

    def _drop_older_than(self, oldest: int) -> None:
        """Responses with an older token are drawn again."""
        for group in self._begun + self._complete:
            kept = [
                Response(draws=response.draws + 1) if response.is_older_than(oldest) else response
                for response in group.responses
            ]
            dropped = sum(a is not b for a, b in zip(kept, group.responses, strict=True))
            self._counts["dropped_responses"] += dropped
            group.responses = kept
        self._begun += [group for group in self._complete if not group.is_done]
        self._complete = [group for group in self._complete if group.is_done]

    def _begin(self, step: int) -> None:
        """Begins prompts until there are enough for the next `_depth` steps; fewer when the run is to end."""
        wanted = self.share * min(self._depth, self.steps - step)
        if self._step is None:
            self._step = step
        while len(self._begun) + len(self._complete) < wanted:
            if not self._next:
                self._next.extend((self._step, index) for index in self._own)
                self._step += 1
            self._begun.append(Group(*self._next.popleft(), self._new_responses()))

    def _new_responses(self) -> list[Response]:
        return [Response() for _ in range(self.settings.samples)]

    async def _sample(self, version: int, stop: "Future[None]") -> None:
        """Samples until `stop` is set and a batch is complete; then aborts what still runs."""
        stop_requested, self._is_stopped = asyncio.wrap_future(stop), False
        first = asyncio.FIRST_COMPLETED
        async with event_loop_session(self.settings.request_timeout_s) as http:
            flights = {asyncio.create_task(self._fly(http, g, version)) for g in self._begun}
            flying: set[asyncio.Future[None]] = {*flights}
            try:
                while not stop_requested.done():
                    flying -= await landed({*flying, stop_requested}, return_when=first)
                self.ready = len(self._complete)
                while len(self._complete) < self.share:
                    flying -= await landed(flying, return_when=first)
                self._is_stopped = True
                while self._running:
                    await self._abort()
                    flying -= await landed(flying, timeout=_ABORT_AGAIN_S)
            finally:  # what is not graded yet is graded next time
                await cancelled(flights)
        # An evaluation may grade next, with the same workers: what is being graded comes to its end.
        await asyncio.wrap_future(self._grader.start(lambda: None))
        for group in self._begun:
            self._set_rewards(group)

    async def _fly(self, http: aiohttp.ClientSession, group: Group, version: int) -> None:
        """Completes a group; without an end, with what there is, if the stream is stopped."""
        group.client = None  # weights are new, and caches empty
        while True:
            prompt = self._prompt(group)
            # One request for all; but no sample of an environment waits for the turns of others.
            parts = [group.responses]
            if self._turns is not None:
                parts = [[response] for response in group.responses]
            await together(self._finish(http, group, part, prompt, version) for part in parts)
            if not group.is_done:
                return
            await self._grade(group, prompt)
            rewards = {response.reward for response in group.responses}
            if len(rewards) > 1 or group.attempt == self.settings.refill_rounds:
                break
            # Dynamic sampling, as in `collector`: without variance there is nothing to learn.
            self._counts["refilled_prompts"] += 1
            group.attempt, group.responses = group.attempt + 1, self._new_responses()
        self._begun.remove(group)
        self._complete.append(group)

    async def _finish(
        self,
        http: aiohttp.ClientSession,
        group: Group,
        responses: list[Response],
        prompt: Prompt,
        version: int,
    ) -> None:
        """Asks for some of a group's responses until they are done, or the stream is stopped."""
        while True:
            if self._turns is not None:
                graded = await self._turns.go_on(responses, prompt)
                self._tally += graded  # read after the wait: other groups add to it meanwhile
            rest = [response for response in responses if not response.is_done]
            if not rest or self._is_stopped:
                return
            await self._request(http, group, rest, prompt, version)

    async def _request(
        self,
        http: aiohttp.ClientSession,
        group: Group,
        rest: list[Response],
        prompt: Prompt,
        version: int,
    ) -> None:
        """Asks a server for the rest of responses: one for a group, which has its prompt and turns in its cache."""
        settings, names = self.settings, [uuid.uuid4().hex for _ in rest]
        if group.client not in self.pool.clients:
            group.client = self._least_busy()
        client, sampling = group.client, self.collector.sampling
        self._running |= dict.fromkeys(names, client)
        try:
            pieces = await client.generate_each(
                http,
                names,
                [prompt.ids + response.ids for response in rest],
                [
                    replace(sampling, max_new_tokens=sampling.max_new_tokens - len(response.ids))
                    for response in rest
                ],
                self._seeds(group, rest) if settings.deterministic else None,
                self.collector.routing,
            )
        except ServerLost as error:
            self._lose(client, error)
            return
        finally:
            for name in names:
                del self._running[name]
        for response, piece in zip(rest, pieces, strict=True):
            if piece.ids:
                check_version(piece.version, [version])
            if response.said:
                self._counts["turn_tokens"] += len(prompt.ids) + len(response.ids)
                self._counts["cached_tokens"] += piece.cached
            response.add(piece, settings.stop, self._decode)
        if not all(response.is_done for response in rest) and not self._is_stopped:
            self._lose(client, ServerLost("it broke a response off: it is shutting down"))

    def _decode(self, ids: list[int]) -> str:
        return str(self.task.tokenizer.decode(ids))

    def _seeds(self, group: Group, rest: list[Response]) -> list[int]:
        """Of responses of a group: the same however often they are cut."""
        purpose = purpose_of(group.step, group.attempt)
        return [
            self.collector.sampling_seed(purpose + " again" * response.draws, group.index, i)
            for i, response in enumerate(group.responses)
            if any(response is one for one in rest)
        ]

    def _least_busy(self) -> Client:
        """Of the servers the one that samples the fewest of this leader's responses."""
        clients = self.pool.in_turn()
        if not clients:
            raise NoServers("no rollout server is left")
        busy = Counter(id(client) for client in self._running.values())
        return min(clients, key=lambda client: busy[id(client)])

    def _lose(self, client: Client, error: ServerLost) -> None:
        self.pool.resent += 1
        self.pool.remove(client, error)

    async def _grade(self, group: Group, prompt: Prompt) -> None:
        """In another thread: HTTP goes on meanwhile."""
        new = group.ungraded
        if new:
            group.grading = self._grader.start(lambda: grade(self.task, [prompt] * len(new), new))
            await asyncio.wrap_future(group.grading)
            self._set_rewards(group)

    def _set_rewards(self, group: Group) -> None:
        """What its grading gave, if that is done; a grading that did not begin is forgotten."""
        grading, group.grading = group.grading, None
        if grading is None or grading.cancelled():
            return
        texts, rewards, tally = grading.result()
        self._tally += tally
        for response, text, reward in zip(group.ungraded, texts, rewards, strict=True):
            response.text, response.reward = text, reward

    async def _abort(self) -> None:
        """Ends what runs, by name: a server may be another leader's, too."""
        async with event_loop_session(_ABORT_TIMEOUT_S, _ABORTS_AT_ONCE) as http:
            aborts = [client.abort(http, name) for name, client in self._running.items()]
            for error in await asyncio.gather(*aborts, return_exceptions=True):
                # A lost server's requests tell so themselves.
                if error is not None and not isinstance(error, ServerLost):
                    raise error

    def _prompt(self, group: Group) -> Prompt:
        """Depends on place and attempt alone: neither on other groups nor on the number of ranks."""
        return self._prompts(group.step)[group.attempt * self.settings.prompts + group.index]

    def _take(self, step: int) -> Collected:
        """The complete groups with the oldest tokens, which could be too old in the next step."""
        # In the order of prompts, whichever was complete first.
        self._complete.sort(key=lambda group: (group.oldest, group.step, group.index))
        taken, self._complete = self._complete[: self.share], self._complete[self.share :]
        samples = [
            response.sample(self._prompt(group), self._own.start + i)
            for i, group in enumerate(taken)
            for response in group.responses
        ]
        if self.collector.record is not None:
            write_samples(self.collector.record, step, self.rank, samples)
        responses = [response for group in taken for response in group.responses]
        names = ["refilled_prompts", "dropped_responses"]
        self._counts["cut_responses"] = sum(response.is_cut for response in responses)
        if self._turns is not None:
            names += ["turn_tokens", "cached_tokens", "turns"]
            self._counts["turns"] = sum(len(response.turns) for response in responses)
        names.append("cut_responses")
        counts = {f"rollout/{name}": self._counts[name] for name in names}
        tally, self._tally, self._counts = self._tally, GradingStats(), Counter()
        return Collected(samples, tally, counts)


def adapted(depth: int, ready: float, ahead: int) -> int:
    """Steps' worth of prompts in flight: one more if the learner had to wait, less if two were ready.

    ready: steps' worth that was complete when the learner was. ahead: the bound.
    """
    if ready < 1:
        return min(ahead, depth + 1)
    return max(1, depth - 1) if ready >= 2 else depth


def stopped() -> "Future[None]":
    """The `stop` of a stream that returns as soon as a batch is complete."""
    stop: Future[None] = Future()
    stop.set_result(None)
    return stop
