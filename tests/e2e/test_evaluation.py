"""Responses of a real server: sampled once, kept, graded as in training."""

import itertools

from transformers import AutoTokenizer

from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import Suite
from megatron_fp16rl.rollout import evaluation
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.evaluation import Questions, respond
from tests import models


def questions(metric, problems):
    recipe = models.recipe()
    suite = Suite(suite=f"held-out:{metric}", problems=problems, max_new_tokens=4, top_p=0.5)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(recipe.model))
    return Questions.of(suite, recipe, tokenizer, 0)


def test_kept_responses_are_not_sampled_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 8)
    client, suite, steps = Client(server.endpoint, 60), questions("avg@4", 6), []
    rows, tally = respond([client], suite, None, tmp_path, steps.append, chunk=8)
    assert [(row["problem"], row["try"]) for row in rows] == list(
        itertools.product(range(6), range(4))
    )
    assert steps == [8, 8, 8]
    assert tally.graded == sum(not row["truncated"] for row in rows)
    assert all(row["reward"] == 0 for row in rows if row["truncated"])
    assert evaluation.is_complete(tmp_path, 24)
    (tmp_path / "responses_00001.jsonl").unlink()
    assert not evaluation.is_complete(tmp_path, 24)
    again, _ = respond([client], suite, None, tmp_path, chunk=8)
    assert again[:8] == rows[:8]
    assert again[16:] == rows[16:]
    assert again[8:16] != rows[8:16]  # sampled anew
    kept, _ = respond([], suite, None, tmp_path, chunk=8)
    assert kept == again  # without a server
    result = evaluation.measure(suite.suite, rows)
    assert (result["problems"], result["responses"]) == (6, 24)


def test_greedy_responses_are_all_alike(server):
    client, suite = Client(server.endpoint, 60), questions("greedy", 3)
    rows, repeated = (respond([client], suite)[0] for _ in range(2))
    assert [row["text"] for row in rows] == [row["text"] for row in repeated]
