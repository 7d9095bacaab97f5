"""Training and held-out prompts, what a recipe is checked for, and graded samples."""

import random
from dataclasses import replace

import pytest
import torch

from megatron_fp16rl import checks
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.data.tasks import check, make
from megatron_fp16rl.recipe import AdditionTask, DatasetTask, RecipeError, Suite
from megatron_fp16rl.recipe import load as load_recipe
from megatron_fp16rl.rollout.client import Generation, ServerError
from megatron_fp16rl.rollout.collector import to_samples
from megatron_fp16rl.rollout.evaluation import Questions
from megatron_fp16rl.utils.files import write_json_lines
from megatron_fp16rl.warm_start import answered
from tests import models
from tests.conftest import ROOT


class Characters:
    """A tokenizer for tests of tasks: one token a character; 0 and 1 are special."""

    chat_template = "<user>...<assistant>"

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(chr(i) for i in ids if i > 1)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return f"<user>{messages[0]['content']}<assistant>"


def addition(seed=0, **settings):
    return make(AdditionTask(kind="addition", **settings), Characters(), seed=seed)


def test_addition_holds_out_both_orders():
    task = addition(held_out=0.1)
    assert len(task.training) + len(task.held_out) == 10_000
    assert 950 < len(task.held_out) < 1050
    held_out = set(task.held_out)
    assert all((b, a) in held_out for a, b in held_out)
    assert not held_out & set(task.training)
    asked = {prompt.text for prompt in task.held_out_prompts(10_000)}
    assert len(asked) == len(task.held_out)
    trained = {p.text for step in range(40) for p in task.training_prompts(step, 32)}
    assert not trained & asked


def test_addition_answers_run_from_the_least_significant_digit():
    task = addition()
    for prompt in task.training_prompts(0, 200):
        a, b = prompt.text.removesuffix("=").split("+")
        assert len(a) == len(b) == 2
        assert prompt.answer == f"{int(a) + int(b):03d}"[::-1]
        assert prompt.ids == [ord(c) for c in prompt.text]
        responses = [prompt.answer, prompt.answer + "0", prompt.answer[:2]]
        assert [g.reward for g in task.grades([prompt] * 3, responses)] == [1, 0, 0]


def test_prompts_depend_on_seed_and_step_alone():
    one, same, other = (addition(seed) for seed in (1, 1, 2))
    assert one.training_prompts(3, 8) == same.training_prompts(3, 8)
    assert one.training_prompts(3, 8) != one.training_prompts(4, 8)
    assert one.training_prompts(3, 8) != other.training_prompts(3, 8)
    assert one.held_out_prompts(8) == other.held_out_prompts(8)


MATH = ROOT / "recipes/tiny/data/math.jsonl"
MATH_RECIPE = ROOT / "recipes/tiny/smollm2-math-fp16.yaml"


def problems(path, *rows):
    """A file of (problem, answer)."""
    write_json_lines(path, [{"problem": problem, "answer": answer} for problem, answer in rows])
    return str(path)


def dataset(**changes):
    """The task of the shipped problems, or of others."""
    settings = DatasetTask(**{"kind": "dataset", "path": str(MATH), **changes})
    return make(settings, Characters(), seed=0)


def test_epochs_have_orders_of_their_own_and_miss_nothing():
    task = dataset(held_out=0.2)
    held_out = {p.text for p in task.held_out_prompts(100)}
    assert len(held_out) == 6
    epochs = [
        [p.text for s in range(6) for p in task.training_prompts(s + 6 * e, 4)] for e in (0, 1)
    ]
    assert len(set(epochs[0])) == 24
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert not held_out & set(epochs[0])


def test_the_place_in_the_data_is_a_function_of_the_step_alone():
    """So a resumed run needs nothing but its step, and a warm start may take steps below zero."""
    task = dataset(held_out=0.0)
    seen = {step: task.training_prompts(step, 7) for step in range(-5, 12)}
    for step in (11, -5, 3, 0):
        assert dataset(held_out=0.0).training_prompts(step, 7) == seen[step]
    row = [p.text for step in range(-5, 12) for p in seen[step]][5:]  # from position -30
    for start in range(0, 90, 30):
        assert len(set(row[start : start + 30])) == 30


def test_problems_that_are_there_twice_are_asked_once_those_with_several_answers_never(tmp_path):
    rows = [(f"{i % 10}?", i if i in (13, 25) else i % 10) for i in range(30)]
    task = dataset(path=problems(tmp_path / "twice.jsonl", *rows), held_out=0.25)
    prompts = task.held_out_prompts(99) + task.training_prompts(0, 6)
    assert sorted(p.answer for p in prompts) == list("01246789")
    assert task.description == (
        "6 problems to train on, 2 held out, 16 repeats left out, "
        "2 with several answers (as '3?') left out"
    )


def test_who_asks_for_held_out_problems_is_told_that_there_are_none(tmp_path):
    path = problems(tmp_path / "two.jsonl", ("1?", 1), ("2?", 2))

    def recipe_with(*settings):
        return load_recipe(MATH_RECIPE, [f"task.path={path}", "gates=[]", *settings])

    checks.check(recipe_with())  # a fifth of two is rounded to none
    checks.check(recipe_with("trainer.suites=[{suite: 'training:avg@4'}]"))
    for asks, named in (
        ("gates=[{metric: eval/accuracy, below: 0.1}]", "gates: eval/accuracy"),
        ("gates=[{metric: eval/errors, above: 1}]", "gates: eval/errors"),
        ("trainer.suites=[{suite: 'held-out:greedy'}]", "trainer.suites: held-out:greedy"),
        ("warm_start={accuracy: 0.5}", "warm_start.accuracy=0.5"),
    ):
        with pytest.raises(RecipeError, match=rf"{named}: asks .* task.held_out=0.2 leaves none"):
            checks.check(recipe_with(asks))
        checks.check(recipe_with(asks, "task.held_out=0.5"))
    task = dataset(path=path)
    assert task.held_out_prompts(8) == []
    with pytest.raises(RecipeError, match="holds no problems out"):
        Questions.of(Suite(suite="held-out:greedy"), recipe_with(), task.tokenizer, 0)


def test_long_problems_are_left_out_and_the_split_stays(tmp_path):
    path = problems(tmp_path / "long.jsonl", *(("x" * (i + 1), i) for i in range(40)))
    options = {"path": path, "held_out": 0.5, "template": "none", "instruction": ""}
    whole, short = dataset(**options), dataset(**options, max_prompt_tokens=25)
    kept = {p.text for p in whole.held_out_prompts(99) if len(p.ids) <= 25}
    assert 0 < len(kept) < 20
    assert {p.text for p in short.held_out_prompts(99)} == kept
    trained = {p.text for p in short.training_prompts(0, len(short.training))}
    assert len(trained) + len(kept) == 25
    assert max(map(len, trained)) <= 25
    assert "15 of over 25 tokens left out" in short.description
    with pytest.raises(RecipeError, match=r"of 40 problems none is left .*max_prompt_tokens=0*1 "):
        dataset(**{**options, "held_out": 0.1}, max_prompt_tokens=1)


def test_prompts_that_leave_no_room_for_a_response_are_refused(tmp_path):
    path = problems(tmp_path / "long.jsonl", *(("1+" * n + "1=", n + 1) for n in (1, 20, 40)))
    plain = {"kind": "dataset", "path": path, "template": "none", "instruction": ""}
    plain |= {"held_out": 0, "reward": {"kind": "exact"}}
    usual = models.recipe().rollout.model_dump()

    def check(partial=False, limit=None, new=60, suites=(), **sglang):
        checks.check(
            models.recipe(
                task={**plain, "max_prompt_tokens": limit},
                rollout={**usual, "max_new_tokens": new, "sglang": sglang},
                trainer={"steps": 3, "suites": suites},
            ),
            partial,
        )

    check(new=5)
    check(limit=68)
    check(context_length=142)
    message = (
        r"a prompt of 82 tokens .* response of 60 .* context of 128 .*task.max_prompt_tokens=68"
    )
    own = [{"suite": "training:avg@2", "max_new_tokens": 60}]
    asked = [{"suite": f"{path}:avg@1", "max_new_tokens": 60}]
    for settings, refusal in (
        ({}, message),
        ({"partial": True}, message),
        ({"new": 5, "limit": 2}, "max_prompt_tokens=2: of 3 problems every one is longer"),
        ({"allow_auto_truncate": True}, "would cut prompts in silence"),
        ({"new": 5, "suites": asked}, "a prompt of 82 tokens"),
        ({"new": 5, "suites": own}, message),
        ({"context-length": 100}, "more than the context of 100 "),
    ):
        with pytest.raises(RecipeError, match=refusal):
            check(**settings)
    sums = models.recipe(rollout={**usual, "max_new_tokens": 125})
    with pytest.raises(RecipeError, match=r"a prompt of 6 tokens .* 125 .* lower max_new_tokens$"):
        checks.check(sums)


def test_plans_want_no_data_but_read_what_is_here(tmp_path):
    absent = load_recipe(MATH_RECIPE, [f"task.path={tmp_path}/absent.jsonl"])
    checks.check(absent, partial=True)
    with pytest.raises(RecipeError, match="there is no file"):
        checks.check(absent)
    bad = problems(tmp_path / "bad.jsonl", ("?", None))
    with pytest.raises(RecipeError, match=r"bad.jsonl:1: there is no 'answer'"):
        checks.check(load_recipe(MATH_RECIPE, [f"task.path={bad}"]), partial=True)


def test_the_noise_of_a_warm_start_spares_prompts_and_the_end_of_the_answer():
    class Tokenizer(Characters):
        eos_token_id = 1

    task = make(AdditionTask(kind="addition"), Tokenizer(), seed=0)
    prompts = task.training_prompts(0, 2000)
    clean = answered(task, prompts)
    noisy = answered(task, prompts, noise=0.25, rng=random.Random(0))
    changed = clean.tokens != noisy.tokens
    assert torch.equal(clean.mask, noisy.mask)
    assert not changed[~clean.mask].any()
    digits, end = changed[clean.mask].view(2000, 4).split([3, 1], 1)
    assert not end.any()
    # Some tokens are replaced by their like: one in ten of the digits, one in two of the carries.
    assert 0.17 < digits.float().mean() < 0.25


def test_a_truncated_answer_earns_nothing_and_foreign_weights_are_refused():
    task = addition()
    prompts = task.training_prompts(0, 3)
    # The server's text may be less than what its tokens say, which are what is learnt.
    tokens = [[0, *map(ord, prompt.answer), 1] for prompt in prompts]
    wholes = [Generation(ids, [-0.1] * len(ids), "?", False, version="3") for ids in tokens]
    numbered = list(enumerate(prompts))
    cut, wrong = replace(wholes[1], truncated=True), replace(wholes[2], ids=[ord("?"), 1])
    responses = [wholes[0], cut, wrong]
    collected = to_samples(task, numbered, responses, {3})
    samples = collected.samples
    assert [s.reward for s in samples] == [1, 0, 0]
    assert [(s.group, s.prompt) for s in samples] == numbered
    assert [s.truncated for s in samples] == [False, True, False]
    assert [s.text for s in samples] == [prompts[0].answer, prompts[1].answer, "?"]
    assert collected.tally == GradingStats(graded=2)
    with pytest.raises(ServerError, match="version '3', but version 4"):
        to_samples(task, numbered, wholes, {4})


def test_the_file_of_a_function_is_checked_before_anything_starts(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def grade(prompt, response, answer):\n    return 1.0\n")

    def task(reward):
        reward = {"kind": "function", "path": reward}
        return DatasetTask(kind="dataset", path=str(MATH), reward=reward)

    check(task(f"{path}:grade"))
    with pytest.raises(RecipeError, match=r"no function 'score'; it has: grade"):
        check(task(f"{path}:score"))
    with pytest.raises(RecipeError, match=r"task.reward.path=.*there is no file .*absent.py"):
        check(task(f"{tmp_path}/absent.py:score"))
    path.write_text("import no_such_module\n")
    with pytest.raises(RecipeError, match=r"ModuleNotFoundError: .*mine.py:1"):
        check(task(f"{path}:score"))
