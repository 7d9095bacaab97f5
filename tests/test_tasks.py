"""Prompts, held-out prompts and rewards."""

import random
from dataclasses import replace

import pytest
import torch

from megatron_fp16rl.recipe import AdditionTask, MathTask, RecipeError
from megatron_fp16rl.rollout.client import Generation, ServerError
from megatron_fp16rl.rollout.rollouts import to_sample
from megatron_fp16rl.tasks import make
from megatron_fp16rl.tasks.math import read_problems
from megatron_fp16rl.warm_start import answered
from tests.conftest import ROOT


class Characters:
    """A tokenizer for tests of tasks: one token a character."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return f"<user>{messages[0]['content']}<assistant>"


def test_addition_holds_out_both_orders():
    task = make(AdditionTask(kind="addition", held_out=0.1), Characters(), seed=0)
    assert len(task.training) + len(task.held_out) == 10_000
    assert 950 < len(task.held_out) < 1050
    held_out = set(task.held_out)
    assert all((b, a) in held_out for a, b in held_out)
    assert not held_out & set(task.training)
    prompts = task.held_out_prompts(512)
    assert len({p.text for p in prompts}) == 512
    trained = {p.text for step in range(40) for p in task.training_prompts(step, 32)}
    assert not trained & {p.text for p in task.held_out_prompts(10_000)}


def test_addition_answers_run_from_the_least_significant_digit():
    task = make(AdditionTask(kind="addition"), Characters(), seed=0)
    for prompt in task.training_prompts(0, 200):
        a, b = prompt.text.removesuffix("=").split("+")
        assert len(a) == len(b) == 2
        assert prompt.answer == f"{int(a) + int(b):03d}"[::-1]
        assert prompt.ids == [ord(c) for c in prompt.text]
        assert task.reward(prompt, prompt.answer) == 1
        assert task.reward(prompt, prompt.answer + "0") == 0
        assert task.reward(prompt, prompt.answer[:2]) == 0


def test_prompts_depend_on_seed_and_step_alone():
    one, same, other = (
        make(AdditionTask(kind="addition"), Characters(), seed) for seed in (1, 1, 2)
    )
    assert one.training_prompts(3, 8) == same.training_prompts(3, 8)
    assert one.training_prompts(3, 8) != one.training_prompts(4, 8)
    assert one.training_prompts(3, 8) != other.training_prompts(3, 8)
    assert one.held_out_prompts(8) == other.held_out_prompts(8)


MATH = ROOT / "recipes/tiny/data/math.jsonl"


def test_the_shipped_problems_grade_their_own_answers():
    task = make(MathTask(kind="math", path=str(MATH), held_out=0.0), Characters(), seed=0)
    prompts = task.training_prompts(0, 30)
    assert len({p.text for p in prompts}) == 30
    for prompt in prompts:
        assert prompt.text.startswith("<user>")
        assert prompt.text.endswith("<assistant>")
        assert task.reward(prompt, f"So the answer is $\\boxed{{{prompt.answer}}}$.") == 1
        assert task.reward(prompt, "So the answer is $\\boxed{123456}$.") == 0
        assert task.reward(prompt, "I do not know.") == 0


def test_equal_forms_of_an_answer_count(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"problem": "one half?", "answer": "\\\\frac{1}{2}"}\n')
    task = make(MathTask(kind="math", path=str(path), held_out=0.0), Characters(), seed=0)
    (prompt,) = task.training_prompts(0, 1)
    assert task.reward(prompt, "It is \\boxed{0.5}.") == 1


def test_epochs_have_orders_of_their_own_and_miss_nothing():
    task = make(MathTask(kind="math", path=str(MATH), held_out=0.2), Characters(), seed=0)
    held_out = {p.text for p in task.held_out_prompts(100)}
    assert len(held_out) == 6
    epochs = [
        [p.text for s in range(6) for p in task.training_prompts(s + 6 * e, 4)] for e in (0, 1)
    ]
    assert len(set(epochs[0])) == 24
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert not held_out & set(epochs[0])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('{"problem": "1+1?", "answer": "2"}\n{"problem": "x"}\n', r":2: want .*answer"),
        ("not json\n", r":1: want"),
        ("[1]\n", r":1: want"),
        ("", "holds no problems"),
    ],
)
def test_bad_problem_files_are_named_with_their_line(tmp_path, text, pattern):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(RecipeError, match=pattern):
        read_problems(path)
    with pytest.raises(RecipeError, match="there is no file"):
        read_problems(tmp_path / "absent.jsonl")


def test_the_noise_of_a_warm_start_spares_prompts_and_the_end_of_the_answer():
    class Tokenizer(Characters):
        eos_token_id = 1

    task = make(AdditionTask(kind="addition"), Characters(), seed=0)
    prompts = task.training_prompts(0, 2000)
    clean = answered(prompts, Tokenizer())
    noisy = answered(prompts, Tokenizer(), noise=0.25, rng=random.Random(0))
    changed = clean.tokens != noisy.tokens
    assert torch.equal(clean.mask, noisy.mask)
    assert not changed[~clean.mask].any()
    digits, end = changed[clean.mask].view(2000, 4).split([3, 1], 1)
    assert not end.any()
    # Some tokens are replaced by their like: one in ten of the digits, one in two of the carries.
    assert 0.17 < digits.float().mean() < 0.25


def test_a_truncated_answer_earns_nothing_and_foreign_weights_are_refused():
    task = make(AdditionTask(kind="addition"), Characters(), seed=0)
    prompt = task.training_prompts(0, 1)[0]
    whole = Generation([1, 2], [-0.1, -0.1], prompt.answer, truncated=False, version="3")
    assert to_sample(task, 0, prompt, whole, 3).reward == 1
    assert to_sample(task, 0, prompt, replace(whole, truncated=True), 3).reward == 0
    with pytest.raises(ServerError, match="version '3', but version 4"):
        to_sample(task, 0, prompt, whole, 4)
