"""Prompts, held-out prompts, where they come from and how they are put."""

import contextlib
import json
import random
from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from pydantic import ValidationError

from megatron_fp16rl import checks
from megatron_fp16rl.data.rewards import GradingStats, Row, open_grader
from megatron_fp16rl.data.tasks import check, make, templates
from megatron_fp16rl.data.tasks.dataset import load, read_problems
from megatron_fp16rl.recipe import (
    AdditionTask,
    DatasetTask,
    MathVerifyReward,
    RecipeError,
    Rollout,
    Suite,
)
from megatron_fp16rl.recipe import load as load_recipe
from megatron_fp16rl.rollout.client import Generation, ServerError
from megatron_fp16rl.rollout.collector import to_samples
from megatron_fp16rl.rollout.evaluation import Questions, task_of
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
        responses = [prompt.answer, prompt.answer + "0", prompt.answer[:2]]
        assert [g.reward for g in task.grades([prompt] * 3, responses)] == [1, 0, 0]


def test_prompts_depend_on_seed_and_step_alone():
    one, same, other = (
        make(AdditionTask(kind="addition"), Characters(), seed) for seed in (1, 1, 2)
    )
    assert one.training_prompts(3, 8) == same.training_prompts(3, 8)
    assert one.training_prompts(3, 8) != one.training_prompts(4, 8)
    assert one.training_prompts(3, 8) != other.training_prompts(3, 8)
    assert one.held_out_prompts(8) == other.held_out_prompts(8)


MATH = ROOT / "recipes/tiny/data/math.jsonl"


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


def test_problems_that_are_there_twice_are_asked_once(tmp_path):
    path = tmp_path / "twice.jsonl"
    rows = [{"problem": f"{i % 10}?", "answer": i % 10} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = dataset(path=str(path), held_out=0.3)
    prompts = task.held_out_prompts(99) + task.training_prompts(0, 7)
    assert sorted(p.answer for p in prompts) == [str(i) for i in range(10)]
    assert task.description == "7 problems to train on, 3 held out, 20 repeats left out"


def test_a_problem_with_several_answers_is_not_asked(tmp_path):
    path = tmp_path / "odds.jsonl"
    rows = [{"problem": f"{i % 10}?", "answer": i if i in (13, 25) else i % 10} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = dataset(path=str(path), held_out=0.25)
    prompts = task.held_out_prompts(99) + task.training_prompts(0, 6)
    assert sorted(p.answer for p in prompts) == list("01246789")
    assert task.description == (
        "6 problems to train on, 2 held out, 16 repeats left out, "
        "2 with several answers (as '3?') left out"
    )


def test_who_asks_for_held_out_problems_is_told_that_there_are_none(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text('{"problem": "1?", "answer": 1}\n{"problem": "2?", "answer": 2}\n')

    def wanted(*settings):
        given = [f"task.path={path}", "gates=[]", *settings]
        return load_recipe(ROOT / "recipes/tiny/smollm2-math-fp16.yaml", given)

    checks.check(wanted())  # a fifth of two is rounded to none
    checks.check(wanted("trainer.suites=[{suite: 'training:avg@4'}]"))
    for asks, named in (
        ("gates=[{metric: eval/accuracy, below: 0.1}]", "gates: eval/accuracy"),
        ("gates=[{metric: eval/errors, above: 1}]", "gates: eval/errors"),
        ("trainer.suites=[{suite: 'held-out:greedy'}]", "trainer.suites: held-out:greedy"),
        ("warm_start={accuracy: 0.5}", "warm_start.accuracy=0.5"),
    ):
        with pytest.raises(RecipeError, match=rf"{named}: asks .* task.held_out=0.2 leaves none"):
            checks.check(wanted(asks))
        checks.check(wanted(asks, "task.held_out=0.5"))
    task = dataset(path=str(path))
    assert task.held_out_prompts(8) == []
    with pytest.raises(RecipeError, match="holds no problems out"):
        Questions.of(Suite(suite="held-out:greedy"), wanted(), task.tokenizer, 0)


def test_long_problems_are_left_out_and_the_split_stays(tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"problem": "x" * (i + 1), "answer": i} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"path": str(path), "held_out": 0.5, "template": "none", "instruction": ""}
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


OK = '{"problem": "1+1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (
            '{"problem": "1+1?", "answer": "2"}\n\n{"problem": "x", "solution": 3}\n',
            r"bad.jsonl:3: there is no 'answer' \(task.answer .* has problem, solution",
        ),
        (
            '{"problem": "x", "answer": null}',
            r"there is no 'answer' .*or it is empty \(null\)",
        ),
        ('{"problem": "x", "answer": {"value": 3}}', "lead into nested ones"),
        ("[1]\n", r":1: there is no 'problem' .* is no object"),
        ("", "holds no problems"),
        ('{"problem": "x", "answer": true}', ":1: 'answer' is True .*write it as text"),
        (
            '{"problem": "x", "answer": NaN}',
            ":1: 'answer' is nan, not a number: perhaps it is missing",
        ),
        ('{"problem": "x", "answer": 1e400000000}', "is 1e400000000, a number of over 4300 digits"),
        (
            '{"problem": "x", "answer": %s}' % ("9" * 5000),
            r":1: 'answer' is 9{20}\.\.\.9{8}, a number",
        ),
        ('{"problem": "x", "answer": %s}' % ("[" * 10**5), ":1: .*maximum recursion depth"),
        ('{"problem": "x", "answer": 1, "answer": 2}', ":1: .*the key 'answer' is there twice"),
        (
            OK + '{"problem": " \\n ", "answer": 1}',
            r":2: 'problem' \(task.problem\) is empty: leave",
        ),
        (OK + '{"problem": "x", "answer": ""}', r":2: 'answer' \(task.answer\) is empty"),
        (
            OK + r'{"problem": "x\ud83d", "answer": 1}',
            r":2: 'problem' holds a NUL or half .*x.ud83d",
        ),
        (OK + r'{"problem": "x", "answer": "1\u0000"}', ":2: 'answer' holds a NUL"),
        ((OK + '{"problem": "é"}').encode("latin-1"), "bad.jsonl:2: the file is not UTF-8 text"),
        (OK.encode("utf-16-le"), ":1: the file is not UTF-8 text"),
    ],
)
def test_bad_problem_files_are_named_with_their_line(tmp_path, text, pattern):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=pattern):
        read_problems(path)


def test_files_that_are_none_are_named_with_the_key(tmp_path):
    with pytest.raises(RecipeError, match=r"task.path: there is no file .*--set task.path=FILE"):
        read_problems(tmp_path / "absent.jsonl")
    with pytest.raises(RecipeError, match=r"task.problems: there is no file"):
        check(AdditionTask(kind="addition", problems=str(tmp_path / "absent.jsonl")))
    (tmp_path / "sums.csv").write_text("1+1=,2\n")
    with pytest.raises(RecipeError, match=r"task.problems=.* must end in .jsonl or .parquet"):
        check(AdditionTask(kind="addition", problems=str(tmp_path / "sums.csv")))


def test_a_mark_before_the_text_and_lines_of_windows_are_read(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (OK * 2).replace("\n", "\r\n").encode())
    assert read_problems(path) == [("1+1?", "2")] * 2


def test_a_grader_that_needs_no_answer_may_have_none(tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text('{"problem": "Write a poem.", "answer": ""}\n')
    values = {"kind": "dataset", "path": str(path)}
    judged = {**values, "reward": {"kind": "function", "path": "mine.py:score"}}
    assert load(DatasetTask(**judged)) == [("Write a poem.", "")]
    with pytest.raises(RecipeError, match=r"'answer'.* is empty"):
        load(DatasetTask(**values))


# As JSON has it, and as an answer is to be.
NUMBERS = {
    "1e-05": "0.00001",
    "0.00001": "0.00001",
    "1e16": "10000000000000000",
    "1E+22": "10000000000000000000000",
    "42.0": "42",
    "-42.00": "-42",
    "-0.0": "0",
    "0.10": "0.10",
    "1.50e2": "150",
    "-2.5e-3": "-0.0025",
    "123456789012345678.0": "123456789012345678",
    "12345678901234567890": "12345678901234567890",
    "0.1234567890123456789012345678901": "0.1234567890123456789012345678901",
    "3": "3",
}


def test_numbers_are_answers_in_plain_decimals_to_the_last_digit(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(f'{{"problem": "?", "answer": {number}}}\n' for number in NUMBERS))
    answers = [answer for _, answer in read_problems(path)]
    assert answers == list(NUMBERS.values())
    said = [Row("", f"It is $\\boxed{{{answer}}}$.", answer) for answer in answers]
    other = [("0.1", "0.10"), ("10^{-5}", "0.00001"), ("10^{16}", "10000000000000000")]
    said += [Row("", f"It is $\\boxed{{{text}}}$.", answer) for text, answer in other]
    with open_grader(MathVerifyReward(kind="math_verify", workers=1)) as grade:
        assert [g.reward for g in grade(said)] == [1] * len(said)


def test_numbers_of_parquet_columns_are_no_others(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def read(column, answer="answer"):
        table = pyarrow.table({"problem": ["?"] * len(column), "answer": column})
        parquet.write_table(table, tmp_path / "numbers.parquet")
        return [a for _, a in read_problems(tmp_path / "numbers.parquet", answer=answer)]

    single, double = pyarrow.float32(), pyarrow.float64()
    values = [42.0, 1e-05, 0.1, -0.0, 2.0**24]
    assert read(pyarrow.array(values, double)) == ["42", "0.00001", "0.1", "0", "16777216"]
    assert read(pyarrow.array([2**62])) == [str(2**62)]
    decimal = pyarrow.array([Decimal("0.50"), Decimal("42.00")], pyarrow.decimal128(9, 2))
    assert read(decimal) == ["0.5", "42"]
    mapped = pyarrow.array([[("truth", 0.1)]], pyarrow.map_(pyarrow.string(), double))
    assert read(mapped, "answer.truth") == ["0.1"]
    assert read(pyarrow.array(["a"]).dictionary_encode()) == ["a"]
    for column, pattern in (
        (
            pyarrow.array([1.0, 2.0**53 + 2]),
            r"row 1: 'answer' is 9007199254740994.0 of a float column",
        ),
        (
            pyarrow.array([2.0**25], single),
            "row 0: 'answer' is 33554432.0 of a float column",
        ),
        (pyarrow.array([1.0, float("nan")]), "row 1: 'answer' is nan, not a number"),
        (pyarrow.array([1, None]), "row 1: there is no 'answer'"),
        (pyarrow.array([b"x"]), "row 0: 'answer' is b'x' .*write it as text"),
        (mapped, r"row 0: 'answer' is {'truth': 0.1.*} \(dict\), not a text or a number"),
        (pyarrow.array([True]), "row 0: 'answer' is True"),
    ):
        with pytest.raises(RecipeError, match=pattern):
            read(column)


def test_a_column_of_just_that_name_comes_before_a_path(tmp_path):
    path = tmp_path / "dots.jsonl"
    row = {"problem": "?", "a.b": 1, "a": {"b": 2, "c": 3}}
    path.write_text(json.dumps(row))
    assert read_problems(path, answer="a.b") == [("?", "1")]
    assert read_problems(path, answer="a.c") == [("?", "3")]


def test_damaged_parquet_files_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "damaged.parquet"
    parquet.write_table(pyarrow.table({"problem": ["a"] * 1000, "answer": ["b"] * 1000}), path)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice((None, None, -1, 300))])
        with contextlib.suppress(RecipeError):
            read_problems(path)
            refused -= 1
        refused += 1
    assert refused > 50
    table = pyarrow.table({"problem": ["12+3="], "answer": ["15"]})
    parquet.write_table(
        table, path, use_dictionary=False, compression="NONE", write_page_checksum=True
    )
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\x0012+3=", b"\x05\0\0\x0012+4="))
    with pytest.raises(RecipeError, match=r"damaged.parquet .*CRC"):
        read_problems(path)


def test_prompts_that_leave_no_room_for_a_response_are_refused(tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"problem": "1+" * n + "1=", "answer": n + 1} for n in (1, 20, 40)]
    path.write_text("\n".join(map(json.dumps, rows)))

    def wanted(**task):
        values = {"kind": "dataset", "path": str(path), "template": "none", "instruction": ""}
        return models.recipe(task={**values, "held_out": 0, "reward": {"kind": "exact"}, **task})

    tight = {**models.recipe().rollout.model_dump(), "max_new_tokens": 60}
    recipe = wanted()
    checks.check(recipe)
    recipe = recipe.model_copy(update={"rollout": Rollout(**tight)})
    told = r"a prompt of 82 tokens .* response of 60 .* context of 128 .*task.max_prompt_tokens=68"
    for partial in (False, True):
        with pytest.raises(RecipeError, match=told):
            checks.check(recipe, partial)
    checks.check(wanted(max_prompt_tokens=68).model_copy(update={"rollout": Rollout(**tight)}))
    longer = Rollout(**{**tight, "sglang": {"context_length": 142}})
    checks.check(recipe.model_copy(update={"rollout": longer}))
    with pytest.raises(RecipeError, match="max_prompt_tokens=2: of 3 problems every one is longer"):
        checks.check(wanted(max_prompt_tokens=2))
    cut = Rollout(**{**tight, "sglang": {"allow_auto_truncate": True}})
    with pytest.raises(RecipeError, match="would cut prompts in silence"):
        checks.check(recipe.model_copy(update={"rollout": cut}))
    asked = [{"suite": f"{path}:avg@1", "max_new_tokens": 60}]
    suite = recipe.trainer.model_copy(update={"suites": [Suite(**asked[0])]})
    with pytest.raises(RecipeError, match="a prompt of 82 tokens"):
        checks.check(wanted().model_copy(update={"trainer": suite}))


def test_plans_want_no_data_but_read_what_is_here(tmp_path):
    recipe = ROOT / "recipes/tiny/smollm2-math-fp16.yaml"
    absent = load_recipe(recipe, [f"task.path={tmp_path}/absent.jsonl"])
    checks.check(absent, partial=True)
    with pytest.raises(RecipeError, match="there is no file"):
        checks.check(absent)
    (tmp_path / "bad.jsonl").write_text('{"problem": "?", "answer": null}')
    with pytest.raises(RecipeError, match=r"bad.jsonl:1: there is no 'answer'"):
        checks.check(load_recipe(recipe, [f"task.path={tmp_path}/bad.jsonl"]), partial=True)


def test_a_suite_has_the_columns_of_the_recipe_or_the_usual_ones(tmp_path):
    nested, plain, neither = (tmp_path / f"{name}.jsonl" for name in ("nested", "plain", "neither"))
    nested.write_text(json.dumps(NESTED[0]))
    plain.write_text(OK)
    neither.write_text('{"question": "1+1?", "answer": "2"}\n')
    given = [f"task.path={nested}", *(f"task.{key}={name}" for key, name in COLUMNS.items())]
    recipe = load_recipe(ROOT / "recipes/tiny/smollm2-math-fp16.yaml", given)

    def asked(file):
        return task_of(Suite(suite=f"{file}:avg@4"), recipe)

    assert load(asked(nested)) == read_problems(nested, **COLUMNS)
    assert load(asked(plain)) == [("1+1?", "2")]
    with pytest.raises(
        RecipeError,
        match=r"neither.jsonl:1: suite wants the columns 'prompt.0.content' and "
        r"'reward_model.ground_truth', or 'problem' and 'answer'; the row has question, answer",
    ):
        asked(neither)
    with pytest.raises(RecipeError, match=r"suite: there is no file .*absent"):
        asked(tmp_path / "absent.jsonl")


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
    prompts = task.training_prompts(0, 3)
    wholes = [
        # The server's text may be less than what its tokens say, which are what is learnt.
        Generation(
            [0, *map(ord, p.answer), 1], [-0.1] * (len(p.answer) + 2), "?", False, version="3"
        )
        for p in prompts
    ]
    asked = list(enumerate(prompts))
    given = [wholes[0], replace(wholes[1], truncated=True), replace(wholes[2], ids=[ord("?"), 1])]
    collected = to_samples(task, asked, given, 3)
    samples = collected.samples
    assert [s.reward for s in samples] == [1, 0, 0]
    assert [(s.group, s.prompt) for s in samples] == asked
    assert [s.truncated for s in samples] == [False, True, False]
    assert [s.text for s in samples] == [prompts[0].answer, prompts[1].answer, "?"]
    assert collected.tally == GradingStats(graded=2)
    with pytest.raises(ServerError, match="version '3', but version 4"):
        to_samples(task, asked, wholes, 4)


def test_a_response_keeps_the_space_that_it_begins_with():
    """Of a tokenizer that, as Llama-2's, drops the one before a text's first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i for i, word in enumerate(["</s>", "\u2581Say", "\u2581one", "\u2581.", "\u2581n't"])
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([2, 0], skip_special_tokens=True) == "one"
    assert templates.decode([1], [2, 0, 3, 4], tokenizer) == " one . n't"
    assert templates.decode([1] * 9, [], tokenizer) == ""
    assert templates.decode([0], [2], tokenizer) == "one"


NESTED = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} + 1?\u2028Say."}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "n": i,
    }
    for i in range(5)
]
COLUMNS = {"problem": "prompt.0.content", "answer": "reward_model.ground_truth"}


def test_jsonl_parquet_and_hugging_face_give_the_same_problems(tmp_path):
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in NESTED)
    )
    parquet.write_table(pyarrow.Table.from_pylist(NESTED), tmp_path / "data.parquet")
    wanted = [(f"What is {i} + 1?\u2028Say.", str(i + 1)) for i in range(5)]
    assert read_problems(folder / "train.jsonl", **COLUMNS) == wanted
    assert read_problems(tmp_path / "data.parquet", **COLUMNS) == wanted
    hub = DatasetTask(kind="dataset", name=str(folder), **COLUMNS)
    assert load(hub) == wanted
    assert load(hub.model_copy(update={"answer": "n"})) == [(p, str(int(a) - 1)) for p, a in wanted]
    with pytest.raises(RecipeError, match=r"split test cannot be loaded: ValueError"):
        load(hub.model_copy(update={"split": "test"}))
    with pytest.raises(RecipeError, match=r"row 0: there is no 'question' .* has prompt, "):
        load(hub.model_copy(update={"problem": "question"}))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(RecipeError, match="is not a Parquet file"):
        read_problems(tmp_path / "broken.parquet")


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


def tokenizer_with(*marks):
    from transformers import PreTrainedTokenizerFast

    from megatron_fp16rl.models.build import character_tokenizer

    plain = character_tokenizer(["_", "$", *map(chr, range(32, 95))])
    made = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    made.add_special_tokens({"additional_special_tokens": list(marks)})
    return made


def asks(template, instruction="BOX IT.", **more):
    values = {"template": template, "instruction": instruction, **more}
    return DatasetTask(kind="dataset", path=str(MATH), **values)


def test_templates_say_what_the_models_were_trained_on():
    r1 = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")  # noqa: RUF001
    rendered = templates.render(asks("r1_distill"), "1+1?", tokenizer_with(*r1))
    assert rendered == f"{r1[0]}{r1[1]}1+1?\n\nBOX IT.{r1[2]}<think>\n"
    rendered = templates.render(asks("qwen_math"), "1+1?", None)
    assert rendered == (
        "<|im_start|>system\nBOX IT.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    rendered = templates.render(asks("r1", ""), "{1}+1?", None)
    assert rendered.startswith(
        "A conversation between User and Assistant. The User asks a question, "
    )
    assert rendered.endswith(" <answer> answer here </answer>.\nUser: {1}+1?\nAssistant: <think>")
    assert templates.render(asks("none", ""), "1+1=", None) == "1+1="
    assert templates.render(asks("none"), "1+1?", None) == "1+1?\n\nBOX IT."
    assert templates.render(asks("chat", ""), "1+1?", Characters()) == "<user>1+1?<assistant>"
    templates.check(asks("r1_distill"), tokenizer_with(*r1))
    templates.check(asks("qwen_math"), tokenizer_with("<|im_start|>", "<|im_end|>"))
    templates.check(asks("none"), tokenizer_with())


def test_a_template_for_another_tokenizer_is_refused():
    begins = tokenizer_with("<｜begin▁of▁sentence｜>")  # noqa: RUF001
    with pytest.raises(RecipeError, match=r"r1_distill: .*User.* is no token"):
        templates.check(asks("r1_distill"), begins)
    with pytest.raises(RecipeError, match=r"qwen_math: <\|im_end\|> is no token"):
        templates.check(asks("qwen_math"), tokenizer_with("<|im_start|>"))
    with pytest.raises(RecipeError, match="no chat template; for a base model use none"):
        templates.check(asks("chat"), tokenizer_with())


@pytest.mark.parametrize("template", ["none", "r1", "qwen_math"])
@pytest.mark.parametrize("begins", [True, False], ids=["llama", "qwen"])
def test_plain_text_begins_as_the_models_tokenizer_begins_texts(template, begins, tmp_path):
    """As Llama-3's tokenizer and Qwen's: both know the token, and one puts it before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", "<b>")
    tokenizer.bos_token = "<b>"
    begin = tokenizer.convert_tokens_to_ids("<b>")
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<b> $A", special_tokens=[("<b>", begin)]
        )
    settings = asks(template, max_prompt_tokens=1000)
    task = make(settings, tokenizer, seed=0)
    for prompt in task.training_prompts(0, 3) + task.held_out_prompts(2):
        plain = tokenizer.encode(prompt.text, add_special_tokens=False)
        before = [begin] if begins and template != "qwen_math" else []
        assert prompt.ids == before + plain
        if template != "qwen_math":
            assert prompt.ids == tokenizer(prompt.text).input_ids


def test_variables_of_a_chat_template_reach_it():
    tokenizer = tokenizer_with()
    tokenizer.chat_template = (
        "{% for m in messages %}U{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}NO{% endif %}A"
    )
    off = asks("chat", "", template_options={"enable_thinking": False})
    assert templates.render(asks("chat", ""), "1", tokenizer) == "U1A"
    task = make(off, tokenizer, seed=0)
    assert all(p.text.endswith("NOA") for p in task.training_prompts(0, 2))
    unread = asks("chat", template_options={"enable_thoughts": False})
    with pytest.raises(RecipeError, match=r"template_options.enable_thoughts: .* reads no such"):
        templates.check(unread, tokenizer)
    with pytest.raises(ValidationError, match="template=none: set template: chat, or template_opt"):
        asks("none", template_options={"enable_thinking": False})
