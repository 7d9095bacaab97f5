"""Responses that updates cut, and the prompts of a stream: each once, none too old, at any number of leaders.

The sampler here ends responses at lengths that are given: what is tested is what a stream does with them.
"""

import asyncio
import random
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.rewards import Grade, GradingStats
from megatron_fp16rl.metrics import gates
from megatron_fp16rl.recipe import Gate, Rollout
from megatron_fp16rl.rollout.client import Generation, ServerLost
from megatron_fp16rl.rollout.collector import Collected, Collector
from megatron_fp16rl.rollout.pool import NoServers, Pool
from megatron_fp16rl.rollout.responses import Response
from megatron_fp16rl.rollout.rollouts import Rollouts
from megatron_fp16rl.rollout.stream import Stream, stopped

PROMPT = [7, 7, 7]


def text(ids, **options):
    return "".join(map(chr, ids))


def piece(ids, version, prompt=3, aborted=False, truncated=False):
    """experts: of token i the number i of version `version`."""
    tokens = prompt + len(ids) - 1
    experts = torch.arange(tokens, dtype=torch.int16)[:, None, None] + 100 * version
    logprobs = [-float(version)] * len(ids)
    return Generation(ids, logprobs, "", truncated, str(version), experts, aborted)


def add(response, new, stop=()):
    response.add(new, stop, text)


def test_a_cut_response_keeps_what_sampled_each_token():
    response = Response()
    add(response, piece([], 1, aborted=True))  # it was still waiting
    assert (response.ids, response.is_done, response.is_cut) == ([], False, False)
    # Whether the last token is an end (here it is) was not looked at when it was cut: it is sampled again.
    add(response, piece([10, 11, 1], 1, aborted=True))
    add(response, piece([12, 13, 1], 3, prompt=len(PROMPT) + 2))
    assert response.is_done
    assert response.is_cut
    assert not response.truncated
    assert response.ids == [10, 11, 12, 13, 1]
    assert response.versions == [1, 1, 3, 3, 3]
    assert response.logprobs == [-1, -1, -3, -3, -3]
    # Of every token but the last; token 4, the last of the first piece, ran under the newer weights.
    assert response.experts.flatten().tolist() == [100, 101, 102, 103, 304, 305, 306]
    copy = Response.from_json(response.to_json())
    assert torch.equal(copy.experts, response.experts)
    assert copy.to_json() == response.to_json()


@pytest.mark.parametrize(
    ("earlier", "ids", "stop", "kept"),
    [
        ("a<", "/s>b", ["</s>"], "a</s>"),
        ("a</s", ">", ["</s>"], "a</s>"),
        ("ab", "cd", ["</s>"], None),
        ("ab", "c</s>", ["</s>"], None),  # the server's own to find
        ("x#", "#y", ["</s>", "##"], "x##"),
    ],
)
def test_a_stop_string_across_a_seam_ends_the_response(earlier, ids, stop, kept):
    response = Response()
    add(response, piece([*map(ord, earlier + "?")], 1, aborted=True), stop=stop)
    before = len(PROMPT) + len(earlier)
    add(response, piece([*map(ord, ids + "?")], 2, prompt=before, aborted=True), stop=stop)
    assert text(response.ids) == (kept or earlier + ids)
    assert response.is_done is (kept is not None)
    assert len(response.experts) == len(PROMPT) + len(response.ids) - 1
    assert len(response.logprobs) == len(response.versions) == len(response.ids)


class Sampler:
    """A server: a token of each response at a time, until the response is as long as its prompt says."""

    url = "http://nowhere"

    def __init__(self):
        self.version, self.lost, self.aborted = 0, False, set()

    async def generate_each(self, http, names, prompts, samplings, seeds=None, routing=None):
        if self.lost:
            raise ServerLost("gone")
        requests = zip(names, prompts, samplings, strict=True)
        return await asyncio.gather(*(self.generate(*request) for request in requests))

    async def generate(self, name, prompt, sampling):
        length = random.Random(str(prompt[:3])).choice([1, 2, 3, 5, 40])
        rest, ids = min(length - (len(prompt) - 3), sampling.max_new_tokens), []
        while len(ids) < rest and name not in self.aborted:
            await asyncio.sleep(0)
            ids.append(prompt[0])
        aborted = len(ids) < rest
        return piece(ids, self.version, prompt=len(prompt), aborted=aborted)

    async def abort(self, http, name):
        self.aborted.add(name)


class Prompts:
    """A task whose prompt says its step and place; every fourth prompt has equal rewards."""

    tokenizer, environment = SimpleNamespace(decode=text), None

    def __init__(self, takes_s=0.0):
        self.takes_s, self.graded, self.asked = takes_s, Counter(), 0

    def training_prompts(self, step, count):
        self.asked += 1
        return [
            Prompt("", [30 + step, 30 + i, 30], "", index=1000 * step + i) for i in range(count)
        ]

    def grades(self, prompts, responses):
        time.sleep(self.takes_s)
        self.graded.update(prompt.index for prompt in prompts)
        return [
            Grade(0.0 if prompt.index % 4 == 0 else float(i % 2))
            for i, prompt in enumerate(prompts)
        ]


def stream(sampler, rank=0, size=1, steps=30, **settings):
    settings = {"prompts": 8, "samples": 2, "max_new_tokens": 30, "ahead": 4, **settings}
    pool = Pool(60)
    pool.clients = [sampler]
    return Stream(Collector(Rollout(**settings), Prompts(), pool, 0, rank, size), steps)


def collect(of, sampler, step):
    """A step of the learner: the servers have the weights of `step`, which are learnt one later at most."""
    sampler.version = step
    collected = of.collect(step, step, step + 1, stopped())
    of.adapt(of.ready)
    ages = [step + 1 - min(sample.version) for sample in collected.samples]
    assert max(ages) <= of.settings.ahead
    # Those that would be too old the soonest are taken first.
    pairs = zip(collected.samples[::2], collected.samples[1::2], strict=True)
    taken = [min(a.version[0], b.version[0]) for a, b in pairs]
    assert max(taken) <= min([group.oldest for group in of._complete], default=step)
    return collected


def test_every_prompt_is_learnt_once_and_no_token_too_late():
    sampler = Sampler()
    of, seen, counts = stream(sampler), Counter(), Counter()
    for step in range(30):
        collected = collect(of, sampler, step)
        counts.update(collected.counts)
        assert len(collected.samples) == 16
        assert [sample.group for sample in collected.samples] == [i // 2 for i in range(16)]
        seen.update(sample.prompt.index for sample in collected.samples)
    assert set(seen.values()) == {2}
    # Also the prompts that a long response held up: all are learnt at the end.
    assert sorted(seen) == [1000 * step + i for step in range(30) for i in range(8)]
    # How many depends on the machine: what it grades in time.
    assert counts["rollout/cut_responses"] > 10
    assert counts["rollout/dropped_responses"] > 5
    assert not of._begun


def test_the_prompts_of_a_step_are_made_once():
    """On policy too, where environments sample by a stream: making them tokenizes each."""
    sampler = Sampler()
    of = stream(sampler, ahead=0)
    for step in range(3):
        sampler.version = step
        assert len(of.collect(step, step, step, stopped()).samples) == 16
    assert of.task.asked == 3


def test_no_more_is_in_flight_than_keeps_the_learner_from_waiting():
    """It waited: a step's worth more, up to the bound. There were two steps' worth: one less."""
    of, depths = stream(Sampler()), []
    for ready in (0, 7, 8, 15, 16, 40, 0, 0, 0, 0, 16):
        of.adapt(ready)
        depths.append(of._depth)
    assert depths == [2, 3, 3, 3, 2, 1, 2, 3, 4, 4, 3]


def test_prompts_without_signal_are_replaced():
    sampler = Sampler()
    of = stream(sampler, steps=4, refill_rounds=1)
    batches = [collect(of, sampler, step) for step in range(4)]
    assert sum(batch.counts["rollout/refilled_prompts"] for batch in batches) == 8
    # Places 0 and 4 of each step; the prompts that replace them are places 8 and 12.
    indices = {sample.prompt.index for batch in batches for sample in batch.samples}
    assert indices == {1000 * step + i for step in range(4) for i in (1, 2, 3, 5, 6, 7, 8, 12)}


@pytest.mark.parametrize("sizes", [(1, 2), (2, 4, 1)])
def test_unfinished_prompts_go_on_at_another_number_of_leaders(tmp_path, sizes):
    sampler, seen, done = Sampler(), Counter(), 0
    leaders: list[Stream] = []
    for size in sizes:
        leaders = [stream(sampler, rank, size) for rank in range(size)]
        if done:
            for leader in leaders:
                leader.restore(tmp_path / str(done))
        for step in range(done, done + 7):
            for leader in leaders:
                collected = collect(leader, sampler, step)
                seen.update(sample.prompt.index for sample in collected.samples)
        done += 7
        for leader in leaders:
            leader.save(tmp_path / str(done))
    assert set(seen.values()) == {2}
    begun = {1000 * g.step + g.index for of in leaders for g in of._begun + of._complete}
    waiting = {1000 * s + i for of in leaders for s, i in of._next}
    assert not begun & set(seen)
    frontier = max(of._step for of in leaders)
    behind = {1000 * s + i for of in leaders for s in range(of._step, frontier) for i in of._own}
    everything = set(seen) | begun | waiting | behind
    assert everything == {1000 * s + i for s in range(frontier) for i in range(8)}


def test_what_waits_to_be_graded_does_not_keep_the_learner_waiting(tmp_path):
    """It is graded later, also by a stream that was restored, and nothing twice."""
    sampler = Sampler()
    first, second = stream(sampler, steps=4), stream(sampler, steps=4)
    first.task = second.task = Prompts(takes_s=0.02)
    first.adapt(0)
    collect(first, sampler, 0)
    graded = first.task.graded.total()
    time.sleep(0.1)
    assert first.task.graded.total() == graded  # nobody else uses the workers now
    collect(first, sampler, 1)
    first.save(tmp_path)
    second.restore(tmp_path)
    for step in (2, 3):
        collect(second, sampler, step)
    assert len(first.task.graded) == 32
    assert set(first.task.graded.values()) == {2}


def test_what_lost_servers_had_not_answered_is_asked_again():
    sampler = Sampler()
    of = stream(sampler)
    before = {s.prompt.index for s in collect(of, sampler, 0).samples}
    sampler.lost = True
    with pytest.raises(NoServers):
        of.collect(1, 1, 2, stopped())
    sampler.lost, of.pool.clients = False, [sampler]
    after = {s.prompt.index for s in collect(of, sampler, 1).samples}
    assert len(before | after) == 16
    assert of.pool.resent >= 1


@pytest.mark.parametrize(("sent", "cached", "share"), [(0, 0, None), (40, 30, 0.75)])
def test_samples_of_a_single_turn_have_no_share_of_cached_tokens_and_a_gate_knows_it(
    sent, cached, share
):
    counts = {"rollout/turn_tokens": sent, "rollout/cached_tokens": cached}
    world = SimpleNamespace(
        data=None, broadcast_from_leader=lambda value: value, gather=lambda value, _: [value]
    )
    rollouts = SimpleNamespace(
        world=world,
        stream=None,
        publisher=SimpleNamespace(members=[]),
        _with_servers=lambda work, version: (Collected([], GradingStats(), counts), 0),
        _grading=lambda part, tally: {},
    )
    metrics = Rollouts._draw(rollouts, 0, None).metrics
    assert metrics["rollout/cached_tokens_share"] == share
    gate = Gate(metric="rollout/cached_tokens_share", below=0.5)
    assert gates.unknown([gate], [metrics]) is None
    assert gates.check([gate], [metrics]) == []
