"""Rollouts of a user's own function: what it gets, and what it may return."""

import pytest
import torch

from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.models.spec import Routing
from megatron_fp16rl.recipe import AdditionTask, RecipeError, Rollout
from megatron_fp16rl.rollout import function
from megatron_fp16rl.rollout.client import Generation
from megatron_fp16rl.rollout.collector import Collector
from megatron_fp16rl.rollout.function import RolloutError
from tests import models
from tests.unit.test_tasks import Characters

FUNCTION = """
from megatron_fp16rl.rollout.responses import Response

def rollout(client, prompts):
    responses = [Response() for _ in prompts]
    for response, piece in zip(responses, client.generate([p.ids for p in prompts], 4)):
        response.add(piece)
        response.read(client.tokenizer.encode("#"), "#")
    sent = [p.ids + r.ids for p, r in zip(prompts, responses)]
    for response, piece in zip(responses, client.generate(sent, [3] * len(sent))):
        response.add(piece)
    responses[0].reward = 0.5
    FAULT
    return responses
"""
EXPERTS = Routing(sparse=(True,), top_k=1, experts=4)


class FakePool:
    """Samples 7 and 8, of version 3."""

    truncated = False

    def generate(self, prompts, samplings, seeds=None, routing=None):
        self.seeds, self.samplings = seeds, samplings
        pieces = []
        for ids in prompts:
            experts = torch.zeros(len(ids) + 1, 1, 1, dtype=torch.uint8) if routing else None
            pieces.append(Generation([55, 56], [-0.5, -1.0], "", self.truncated, "3", experts))
        return pieces


def collect(tmp_path, fault="pass", routing=None, **settings):
    (tmp_path / "own.py").write_text(FUNCTION.replace("FAULT", fault))
    values = {"prompts": 2, "samples": 2, "max_new_tokens": 8, "temperature": 0.7, **settings}
    rollout = Rollout(**values, function=f"{tmp_path}/own.py:rollout")
    task, pool = make(AdditionTask(kind="addition"), Characters(), seed=0), FakePool()
    return pool, Collector(rollout, task, pool, 0, routing=routing).collect(0, {3})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(3)\n", "own.py ends the program when it is imported: SystemExit"),
        (
            "def rollout(client):\n    return []\n",
            r"rollout is called with \(client, prompts\): too many",
        ),
    ],
)
def test_a_file_that_cannot_serve_is_refused_before_anything_starts(tmp_path, code, message):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(RecipeError, match=message):
        function.find(f"{tmp_path}/own.py:rollout")


def test_a_function_written_in_c_need_not_say_what_it_takes(tmp_path):
    (tmp_path / "own.py").write_text("rollout = max\n")
    assert function.find(f"{tmp_path}/own.py:rollout") is max


@pytest.mark.parametrize("routing", [None, EXPERTS])
def test_a_function_samples_in_turns_and_the_task_grades_what_it_did_not(tmp_path, routing):
    pool, collected = collect(tmp_path, routing=routing, deterministic=True)
    assert [sample.group for sample in collected.samples] == [0, 0, 1, 1]
    for sample in collected.samples:
        assert sample.ids == [55, 56, ord("#"), 55, 56]
        assert sample.mask == [True, True, False, True, True]
        assert sample.version == [3] * 5
        assert (sample.experts is None) == (routing is None)
    assert [sample.reward for sample in collected.samples] == [0.5, 0.0, 0.0, 0.0]
    assert collected.tally.graded == 3
    assert {(one.temperature, one.max_new_tokens) for one in pool.samplings} == {(0.7, 3)}
    assert len(set(pool.seeds)) == 4


@pytest.mark.parametrize(("most", "graded"), [(8, 3), (5, 0)])
def test_only_the_recipes_limit_cuts_a_response(tmp_path, monkeypatch, most, graded):
    """A turn of so many tokens as the function asks for is no response without an end."""
    monkeypatch.setattr(FakePool, "truncated", True)
    _, collected = collect(tmp_path, max_new_tokens=most)
    assert [sample.truncated for sample in collected.samples] == [not graded] * 4
    assert collected.tally.graded == graded


FAULTS = {
    "responses.pop()": "one Response for each of the 4 prompts, in order, not 3",
    "responses = None": "not NoneType",
    "responses[2] = 'text'": "sample 2: it is no Response but a str",
    "responses[1].logprobs.pop()": "sample 1: 4 logprobs of 5 tokens",
    "responses[1].mask.append(True)": "sample 1: 6 mask of 5 tokens",
    "responses[1].mask = [False] * 5": "sample 1: no token of it was sampled",
    "responses[3].logprobs[0] = 0.5": "sample 3: token 0 has log-prob 0.5",
    "responses[3].logprobs[4] = float('nan')": "sample 3: token 4 has log-prob nan",
    "responses[0].versions[1] = 2": "sample 0: token 1 is of version 2, but the servers have 3",
    "responses[0].read([1] * 4, '')": "9 tokens follow the prompt, over rollout.max_new_tokens=8",
    "responses[0].reward = float('inf')": "sample 0: its reward is inf",
    "responses[0].ids[0] = 'x'": "sample 0: its ids are not all token ids",
    "responses[1].read([1], '#')": "sample 1: experts of 10 tokens, not of all 11 but the last",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_learnt_from_is_refused(tmp_path, fault):
    with pytest.raises(RolloutError, match=r"rollout\.function=.*own\.py:rollout") as raised:
        collect(tmp_path, fault, routing=EXPERTS)
    assert FAULTS[fault] in str(raised.value)


GAME = {"kind": "environment", "path": "a.py:A", "problems": "a.jsonl", "template": "none"}


@pytest.mark.parametrize(
    ("ahead", "changes", "message"),
    [
        (2, {}, "cannot be cut by an update and go on; set rollout.ahead: 1"),
        (0, {"trainer": {"steps": 1, "suites": [{"suite": "held-out:avg@2"}]}}, "suites: one"),
        (0, {"task": GAME}, "an environment's samples are played by task.path=a.py:A"),
    ],
)
def test_what_a_function_cannot_do_is_refused_in_the_recipe(ahead, changes, message):
    rollout = {"prompts": 4, "samples": 2, "max_new_tokens": 5, "ahead": ahead}
    rollout["function"] = "own.py:rollout"
    with pytest.raises(ValueError, match=r"rollout\.function=own\.py:rollout") as raised:
        models.recipe(rollout=rollout, algorithm={"old_policy": "rollout"}, **changes)
    assert message in str(raised.value)


def test_a_function_that_is_not_there_is_named():
    with pytest.raises(RecipeError, match=r"rollout\.function=no\.py:rollout: .*no file no\.py"):
        function.find("no.py:rollout")
