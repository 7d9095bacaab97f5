"""Problems in files of several kinds: read to the last digit, or refused by file, line and column."""

import contextlib
import json
import random
from decimal import Decimal

import pyarrow
import pytest
from pyarrow import parquet

from megatron_fp16rl.data.rewards import Row, open_grader
from megatron_fp16rl.data.tasks import check
from megatron_fp16rl.data.tasks.dataset import load, read_problems, task_of
from megatron_fp16rl.recipe import AdditionTask, DatasetTask, MathVerifyReward, RecipeError, Suite
from megatron_fp16rl.recipe import load as load_recipe
from tests.conftest import ROOT

OK = '{"problem": "1+1?", "answer": "2"}\n'


# As JSON has it.
ANSWERS = {
    "null": r":1: there is no 'answer' .*or it is empty \(null\)",
    '{"value": 3}': "lead into nested ones",
    "true": ":1: 'answer' is True .*write it as text",
    "NaN": ":1: 'answer' is nan, not a number: perhaps it is missing",
    "1e400000000": "is 1e400000000, a number of over 4300 digits",
    "9" * 5000: r":1: 'answer' is 9{20}\.\.\.9{8}, a number",
    "[" * 10**5: ":1: .*maximum recursion depth",
    '1, "answer": 2': ":1: .*the key 'answer' is there twice",
    '""': r":1: 'answer' \(task.answer\) is empty",
    r'"1\u0000"': ":1: 'answer' holds a NUL",
}
FILES = [
    ("", "holds no problems"),
    ("[1]\n", r":1: there is no 'problem' .* is no object"),
    (
        OK + '\n{"problem": "x", "solution": 3}',
        r":3: there is no 'answer' .* has problem, solution",
    ),
    (OK + '{"problem": " \\n ", "answer": 1}', r":2: 'problem' \(task.problem\) is empty: leave"),
    (OK + r'{"problem": "x\ud83d", "answer": 1}', r":2: 'problem' holds a NUL or half .*x.ud83d"),
    ((OK + '{"problem": "é"}').encode("latin-1"), "bad.jsonl:2: the file is not UTF-8 text"),
    (OK.encode("utf-16-le"), ":1: the file is not UTF-8 text"),
    *((f'{{"problem": "x", "answer": {answer}}}', said) for answer, said in ANSWERS.items()),
]


@pytest.mark.parametrize(("text", "pattern"), FILES, ids=[pattern for _, pattern in FILES])
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
    rows = [Row("", f"It is $\\boxed{{{answer}}}$.", answer) for answer in answers]
    other = [("0.1", "0.10"), ("10^{-5}", "0.00001"), ("10^{16}", "10000000000000000")]
    rows += [Row("", f"It is $\\boxed{{{text}}}$.", answer) for text, answer in other]
    with open_grader(MathVerifyReward(kind="math_verify", workers=1)) as grade:
        assert [g.reward for g in grade(rows)] == [1] * len(rows)


def column(values, kind=None):
    return pyarrow.array(values, kind and getattr(pyarrow, kind)())


MAPPED = pyarrow.array([[("truth", 0.1)]], pyarrow.map_(pyarrow.string(), pyarrow.float64()))
DECIMALS = pyarrow.array([Decimal("0.50"), Decimal("42.00")], pyarrow.decimal128(9, 2))
COLUMNS_READ = [
    (
        column([42.0, 1e-05, 0.1, -0.0, 2.0**24], "float64"),
        ["42", "0.00001", "0.1", "0", "16777216"],
    ),
    (column([2**62]), [str(2**62)]),
    (DECIMALS, ["0.5", "42"]),
    (column(["a"]).dictionary_encode(), ["a"]),
    (column([1.0, 2.0**53 + 2]), r"row 1: 'answer' is 9007199254740994.0 of a float column"),
    (column([2.0**25], "float32"), "row 0: 'answer' is 33554432.0 of a float column"),
    (column([1.0, float("nan")]), "row 1: 'answer' is nan, not a number"),
    (column([1, None]), "row 1: there is no 'answer'"),
    (column([b"x"]), "row 0: 'answer' is b'x' .*write it as text"),
    (column([True]), "row 0: 'answer' is True"),
    (MAPPED, r"row 0: 'answer' is {'truth': 0.1.*} \(dict\), not a text or a number"),
]


def test_numbers_of_parquet_columns_are_no_others(tmp_path):
    def read(answers, answer="answer"):
        table = pyarrow.table({"problem": ["?"] * len(answers), "answer": answers})
        parquet.write_table(table, tmp_path / "numbers.parquet")
        return [a for _, a in read_problems(tmp_path / "numbers.parquet", answer=answer)]

    for answers, wanted in COLUMNS_READ:
        if isinstance(wanted, list):
            assert read(answers) == wanted
        else:
            with pytest.raises(RecipeError, match=wanted):
                read(answers)
    assert read(MAPPED, "answer.truth") == ["0.1"]


def test_a_column_of_just_that_name_comes_before_a_path(tmp_path):
    path = tmp_path / "dots.jsonl"
    row = {"problem": "?", "a.b": 1, "a": {"b": 2, "c": 3}}
    path.write_text(json.dumps(row))
    assert read_problems(path, answer="a.b") == [("?", "1")]
    assert read_problems(path, answer="a.c") == [("?", "3")]


def test_damaged_parquet_files_are_refused(tmp_path):
    path = tmp_path / "damaged.parquet"
    parquet.write_table(pyarrow.table({"problem": ["a"] * 1000, "answer": ["b"] * 1000}), path)
    whole, draw, read = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice((None, None, -1, 300))])
        with contextlib.suppress(RecipeError):
            read_problems(path)
            read += 1
    assert read < 50
    table = pyarrow.table({"problem": ["12+3="], "answer": ["15"]})
    parquet.write_table(
        table, path, use_dictionary=False, compression="NONE", write_page_checksum=True
    )
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\x0012+3=", b"\x05\0\0\x0012+4="))
    with pytest.raises(RecipeError, match=r"damaged.parquet .*CRC"):
        read_problems(path)


NESTED = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} + 1?\u2028Say."}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "n": i,
    }
    for i in range(5)
]
COLUMNS = {"problem": "prompt.0.content", "answer": "reward_model.ground_truth"}


def test_a_suite_has_the_columns_of_the_recipe_or_the_usual_ones(tmp_path):
    nested, plain, neither = (tmp_path / f"{name}.jsonl" for name in ("nested", "plain", "neither"))
    nested.write_text(json.dumps(NESTED[0]))
    plain.write_text(OK)
    neither.write_text('{"question": "1+1?", "answer": "2"}\n')
    overrides = [f"task.path={nested}", *(f"task.{key}={name}" for key, name in COLUMNS.items())]
    recipe = load_recipe(ROOT / "recipes/tiny/smollm2-math-fp16.yaml", overrides)

    def suite_task(file):
        return task_of(Suite(suite=f"{file}:avg@4"), recipe)

    assert load(suite_task(nested)) == read_problems(nested, **COLUMNS)
    assert load(suite_task(plain)) == [("1+1?", "2")]
    with pytest.raises(
        RecipeError,
        match=r"neither.jsonl:1: suite wants the columns 'prompt.0.content' and "
        r"'reward_model.ground_truth', or 'problem' and 'answer'; the row has question, answer",
    ):
        suite_task(neither)
    with pytest.raises(RecipeError, match=r"suite: there is no file .*absent"):
        suite_task(tmp_path / "absent.jsonl")


def test_jsonl_parquet_and_hugging_face_give_the_same_problems(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in NESTED)
    )
    parquet.write_table(pyarrow.Table.from_pylist(NESTED), tmp_path / "data.parquet")
    expected = [(f"What is {i} + 1?\u2028Say.", str(i + 1)) for i in range(5)]
    assert read_problems(folder / "train.jsonl", **COLUMNS) == expected
    assert read_problems(tmp_path / "data.parquet", **COLUMNS) == expected
    hub = DatasetTask(kind="dataset", name=str(folder), **COLUMNS)
    assert load(hub) == expected
    assert load(hub.model_copy(update={"answer": "n"})) == [
        (p, str(int(a) - 1)) for p, a in expected
    ]
    with pytest.raises(RecipeError, match=r"split test cannot be loaded: ValueError"):
        load(hub.model_copy(update={"split": "test"}))
    with pytest.raises(RecipeError, match=r"row 0: there is no 'question' .* has prompt, "):
        load(hub.model_copy(update={"problem": "question"}))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(RecipeError, match="is not a Parquet file"):
        read_problems(tmp_path / "broken.parquet")
