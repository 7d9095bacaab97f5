"""Estimators against brute force; suites; perfectible problems; the bookkeeping of a sanity grid."""

import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from launch import local
from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.data.tasks.dataset import task_of
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.rollout import evaluation
from megatron_fp16rl.tools import evaluate, sanity
from megatron_fp16rl.tools.settings_file import check_settings
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.terminal import Console
from tests import models
from tests.conftest import ROOT

TINY = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"


def drawn(problems=7, tries=6, seed=0):
    return (np.random.default_rng(seed).random((problems, tries)) < 0.4).astype(float)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_try(k):
    rewards = drawn()
    brute = [
        np.mean([max(subset) for subset in itertools.combinations(tries, k)]) for tries in rewards
    ]
    np.testing.assert_allclose(evaluation.passes(rewards, k), brute)


def test_the_interval_is_that_of_a_mean_over_problems():
    """Held against the spread of means over many samples of problems."""
    generator = np.random.default_rng(1)
    ability = generator.random(100_000)
    inside = 0
    for _ in range(400):
        chosen = generator.choice(ability, 50)
        rewards = (generator.random((50, 4)) < chosen[:, None]).astype(float)
        _, low, high = evaluation.mean_with_interval(rewards.mean(1))
        inside += low <= ability.mean() <= high
    assert 0.91 < inside / 400 < 0.98
    assert evaluation.mean_with_interval(np.array([0.5])) == (0.5, None, None)
    assert evaluation.mean_with_interval(np.ones(9))[2] == 1.0
    # An environment's rewards of turns add up, and may be negative.
    mean, low, high = evaluation.mean_with_interval(np.array([-2.0, -1.0, -3.0, 4.0] * 9))
    assert low < mean == -0.5 < high < 1
    mean, low, high = evaluation.mean_with_interval(np.array([2.0, 3.0] * 9))
    assert 2 < low < mean == 2.5 < high < 3


def test_a_suite_is_parsed_and_a_bad_one_refused():
    aime, greedy = evaluate.parse_suites(["a:b/aime.jsonl:avg@32", "held-out:greedy"], top_p=0.9)
    assert (aime.source, aime.name, aime.metric, aime.k) == ("a:b/aime.jsonl", "aime", "avg", 32)
    assert (greedy.source, greedy.metric, greedy.k) == ("held-out", "greedy", 1)
    assert (aime.is_file, greedy.is_file) == (True, False)
    assert greedy.top_p == 0.9
    for text in ("aime.jsonl", "aime.jsonl:avg", "aime.jsonl:maj@4", ":avg@4", "aime.jsonl:avg@0"):
        with pytest.raises(RecipeError, match="write FILE:METRIC"):
            evaluate.parse_suites([text])
        with pytest.raises(RecipeError, match="write FILE:METRIC"):
            load(TINY, [f"trainer.suites=[{{suite: '{text}'}}]"])
    with pytest.raises(RecipeError, match="needs a RUN"):
        task_of(greedy, None)
    with pytest.raises(RecipeError, match="reads no files"):
        task_of(aime, load(TINY))


def planned(recipe, texts, **settings):
    subject = evaluate.Subject(model_folder(recipe.model), recipe)
    suites = evaluate.parse_suites(texts, **settings)
    return evaluate.plan(subject, suites, subject.server(None, 1, 0)).values()


def test_suites_on_the_same_problems_share_responses():
    texts = ["held-out:avg@4", "held-out:pass@8", "held-out:greedy"]
    settings = {"problems": 6, "temperature": 0.6, "top_p": 0.9}
    sampled, greedy = planned(models.recipe(), texts, **settings)
    assert (sampled.suite.k, sampled.responses) == (8, 48)
    assert (sampled.sampling.temperature, sampled.sampling.top_p) == (0.6, 0.9)
    assert (greedy.suite.k, greedy.sampling.temperature, greedy.sampling.top_p) == (1, 0.0, 1.0)


def test_prompts_that_leave_no_room_for_a_response_are_refused(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text(json.dumps({"problem": "1+" * 10 + "1=", "answer": 11}))
    values = {"kind": "dataset", "path": str(file), "template": "none", "instruction": ""}
    recipe = models.recipe(task={**values, "reward": {"kind": "exact"}})
    assert len(planned(recipe, [f"{file}:avg@1"], max_new_tokens=106)) == 1
    with pytest.raises(RecipeError, match=r"sums.jsonl: a prompt of 22 tokens .* of 107 .* of 128"):
        planned(recipe, [f"{file}:avg@1"], max_new_tokens=107)


def test_a_folder_takes_no_results_of_other_settings(tmp_path):
    file = tmp_path / "asked.json"
    for _ in range(2):
        check_settings(file, {"model": "m", "tries": 4}, "responses", "--out")
    with pytest.raises(RecipeError, match="holds responses with tries = 4, not 8; give another"):
        check_settings(file, {"model": "m", "tries": 8}, "responses", "--out")


def test_perfectible_problems_are_those_solved_now_and_then(tmp_path):
    """And a task may be made of them."""
    recipe = models.recipe()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(recipe.model))
    task = make(recipe.task, tokenizer, 0)
    prompts = task.all_training_prompts(5)
    rows = [
        {"problem": i, "try": j, "reward": float(j < i)}
        for i, j in itertools.product(range(5), range(4))
    ]
    kept = evaluate.solved_now_and_then(rows, [task.as_problem(p) for p in prompts])
    assert [row["solved"] for row in kept] == [0.25, 0.5, 0.75]
    file = tmp_path / "perfectible.jsonl"
    settings = task.settings.model_copy(update={"problems": str(file)})
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    only = make(settings, tokenizer, 0)
    texts = {prompt.text for prompt in prompts[1:4]}
    assert {prompt.text for prompt in only.training_prompts(3, 3)} == texts
    assert {prompt.text for prompt in only.held_out_prompts(99)} == texts
    with pytest.raises(RecipeError, match=r"asks for 4 different sums .* but there are 3"):
        only.training_prompts(0, 4)
    file.write_text('{"problem": "1 plus 2", "answer": 3}\n')
    with pytest.raises(RecipeError, match="is no sum such as"):
        make(settings, tokenizer, 0)


def metrics(rewards):
    rows = [
        {"step": i, "reward/mean": reward, "mismatch/logprob_abs_mean": 1e-4, "time/step_s": 1.0}
        | {"eval/accuracy": reward if i % 5 == 4 else None}
        for i, reward in enumerate(rewards)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_grid_counts_what_broke_and_runs_nothing_twice(tmp_path, monkeypatch):
    """The runs themselves are those of `fp16rl train`; this is only the bookkeeping."""
    ran = []

    def stand_in(recipe, folder, say):
        ran.append((recipe.name, recipe.algorithm.loss, recipe.precision.dtype))
        if recipe.name.startswith("gspo-bf16"):
            raise local.RankDied("learner rank 0 ended\nGateStop: the end")
        (folder / "metrics.jsonl").write_text(metrics([0.1 * i for i in range(10)] + [0.96] * 20))
        write_json(folder / "summary.json", {})

    monkeypatch.setattr(local, "run", stand_in)
    (tmp_path / "start").mkdir()
    write_json(tmp_path / "start" / "summary.json", {})
    (tmp_path / "perfectible.jsonl").write_text('{"problem": "1+2=", "answer": "30"}\n')
    grid, console = ["grpo", "gspo"], Console(stderr=True)
    rows = sanity.run(grid, tmp_path, ["trainer.steps=30"], console)
    cells = [(row["algorithm"], row["dtype"]) for row in rows]
    assert cells == list(itertools.product(grid, ("fp16", "bf16")))
    assert [row["collapsed"] for row in rows] == [False, False, False, True]
    assert rows[3]["reason"] == "GateStop: the end"
    assert rows[0]["steps_to_95"] == 19, "the mean of ten steps, one of them at 0.9"
    assert rows[0]["reward_last"] == pytest.approx(0.96)
    settings = [("ppo_clip", "fp16"), ("ppo_clip", "bf16"), ("gspo", "fp16"), ("gspo", "bf16")]
    assert [entry[1:] for entry in ran] == settings
    assert sanity.run(grid, tmp_path, ["trainer.steps=30"], console) == rows
    assert len(ran) == 4
    assert sanity.write_curves(tmp_path, rows).stat().st_size > 0


@pytest.mark.parametrize(("last", "collapsed"), [(0.39, True), (0.41, False)])
def test_a_reward_that_falls_is_a_collapse(last, collapsed, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(metrics([0.5] * 20 + [last] * 20))
    result = sanity.measure(tmp_path)
    assert result["collapsed"] is collapsed
    assert (result["reward_best"], result["accuracy_last"]) == (0.5, last)
