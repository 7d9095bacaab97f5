"""Problems and answers from JSONL and Parquet files, and from Hugging Face data sets.

What would be read otherwise than its author meant is refused, by file and line or row. Numbers become plain
decimals, to the last digit: `1e-05` would be e - 5 to math-verify, `42.0` not `42` to an exact reward.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_fp16rl.recipe import (
    AdditionTask,
    DatasetTask,
    EnvironmentTask,
    FunctionReward,
    Recipe,
    RecipeError,
    Suite,
    Task,
)

Row = dict[str, Any]
Rows = Iterable[tuple[str, Row]]  # each with where it stands
_ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet")
_MOST_DIGITS = sys.int_info.default_max_str_digits  # more than these, Python's own int() refuses
_EXACT = 2**53  # to which whole numbers are exact in float64


class Number(str):
    """A number as it stands in a JSON file: no digit of it is lost, and none is added."""

    __slots__ = ()


def load(settings: DatasetTask | EnvironmentTask) -> list[tuple[str, str]]:
    """(problem, answer) of every row of a task's data. Raises RecipeError."""
    if isinstance(settings, EnvironmentTask):
        file, columns = Path(settings.problems), (settings.problem, settings.answer)
        return read_problems(file, *columns, blank_answers=True, key="task.problems")
    # Whoever grades in another way may have no use for an answer.
    blank = isinstance(settings.reward, FunctionReward)
    if settings.path is not None:
        path = Path(settings.path)
        return read_problems(path, settings.problem, settings.answer, blank_answers=blank)
    import datasets

    named = f"task.name={settings.name}, config {settings.config}, split {settings.split}"
    try:
        data = datasets.load_dataset(
            settings.name, settings.config, split=settings.split, revision=settings.revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(
            f"{named} cannot be loaded: {type(error).__name__}: {error}. Without a way to the "
            "hub, fetch it elsewhere (hf download --repo-type dataset) and give the folder as task.name"
        ) from error
    rows = ((f"{named}: row {number}", row) for number, row in enumerate(data))
    narrow = _has_narrow_floats(data.features.arrow_schema)
    return _pairs(named, rows, settings.problem, settings.answer, blank, narrow)


def read_problems(
    path: Path,
    problem: str = "problem",
    answer: str = "answer",
    blank_answers: bool = False,
    key: str = "task.path",
) -> list[tuple[str, str]]:
    """(problem, answer) of every row of a JSONL or Parquet file.

    problem, answer: columns; dots lead into nested ones and numbers into lists, unless a column has just
    that name. key: that names the file. Raises RecipeError naming file, line or row, and what is wrong.
    """
    rows, narrow = _rows(path, key), False
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow
        from pyarrow import parquet

        try:
            narrow = _has_narrow_floats(parquet.read_schema(path))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise RecipeError(f"{path} is not a Parquet file: {error}") from None
    return _pairs(f"{key}={path}", rows, problem, answer, blank_answers, narrow)


def columns(path: Path, choices: Sequence[tuple[str, str]], key: str) -> tuple[str, str]:
    """The first of some pairs of columns that the file's first row has. key: that names the file.

    Raises RecipeError if there is none.
    """
    for where, row in _rows(path, key):
        for pair in choices:
            if all(_find(row, name) is not None for name in pair):
                return pair
        pairs = ", or ".join(" and ".join(map(repr, pair)) for pair in choices)
        raise RecipeError(f"{where}: {key} wants the columns {pairs}; the row {_known(row)}")
    raise RecipeError(f"{key}: {path} holds no problems")


def read_sums(path: Path) -> list[tuple[int, int]]:
    """The (a, b) of a file of problems such as `27+85=`. Raises RecipeError."""
    pairs = []
    for problem, _ in read_problems(path, key="task.problems"):
        match = re.fullmatch(r"(\d{1,100})\+(\d{1,100})=", problem)
        if match is None:
            raise RecipeError(f"task.problems={path}: {problem!r} is no sum such as '27+85='")
        pairs.append((int(match[1]), int(match[2])))
    return pairs


def _rows(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    if not path.is_file():
        remedy = f"; give one with --set {key}=FILE" if key.startswith("task.") else ""
        raise RecipeError(f"{key}: there is no file {path}{remedy}")
    if path.suffix not in _ENDINGS:
        raise RecipeError(f"{key}={path}: the file must end in .jsonl or .parquet")
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    # Bytes that are no UTF-8 become surrogates, which no UTF-8 holds: so the line of the first is known.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            if not _is_text(line):
                raise RecipeError(
                    f"{where}: the file is not UTF-8 text (Latin-1, UTF-16, compressed?): convert it, e.g. "
                    f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8.jsonl, or it was damaged"
                )
            try:
                row = json.loads(
                    line, parse_int=Number, parse_float=Number, object_pairs_hook=_object
                )
            except (ValueError, RecursionError) as error:
                raise RecipeError(f"{where}: want one JSON object a line; {error}") from None
            yield where, row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:  # whichever is taken, the other was meant
            raise ValueError(f"the key {key!r} is there twice")
    return dict(pairs)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    number = -1
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        what = "is not a Parquet file" if number < 0 else f"is damaged after row {number}"
        raise RecipeError(f"{path} {what}: {error}") from None


def _has_narrow_floats(schema: Any) -> bool:
    """Whether an Arrow schema has float32 or float16: Python makes another number of float32's 0.1."""
    return (
        re.search(
            r"\b(half)?float\b",
            schema.to_string(show_field_metadata=False, show_schema_metadata=False),
        )
        is not None
    )


def _pairs(
    source: str, rows: Rows, problem: str, answer: str, blank_answers: bool, narrow: bool
) -> list[tuple[str, str]]:
    pairs = [
        (
            _text(row, problem, "problem", where, narrow),
            _text(row, answer, "answer", where, narrow, blank_answers),
        )
        for where, row in rows
    ]
    if not pairs:
        raise RecipeError(f"{source} holds no problems")
    return pairs


def _text(
    row: Row, column: str, key: str, where: str, narrow: bool, may_be_blank: bool = False
) -> str:
    value = _find(row, column)
    if value is None:
        raise RecipeError(
            f"{where}: there is no {column!r} (task.{key} names the column), or it is empty (null); the row "
            f"{_known(row)}"
        )
    try:
        text = as_text(value, narrow)
    except ValueError as error:
        raise RecipeError(f"{where}: {column!r} {error}") from None
    if not text.strip() and not may_be_blank:
        raise RecipeError(f"{where}: {column!r} (task.{key}) is empty: leave the row out")
    if not _is_text(text):
        raise RecipeError(
            f"{where}: {column!r} holds a NUL or half a character (a lone surrogate), which no tokenizer "
            f"reads: {text[:60]!a}"
        )
    return text


def _find(row: Row, column: str) -> Any:
    """The value of a column of just that name, else of the one that its dots lead to; None if there is none."""
    if isinstance(row, dict) and column in row:
        return row[column]
    value: Any = row
    try:
        for name in column.split("."):
            value = value[int(name)] if isinstance(value, list) else value[name]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return value


def _known(row: Any) -> str:
    return f"has {', '.join(map(str, row))}" if isinstance(row, dict) else "is no object"


def as_text(value: Any, narrow: bool = False) -> str:
    """A text as it is; a number without an exponent, a whole one without a point.

    narrow: floats may be of float32. Raises ValueError, saying what the value is, for all else.
    """
    if isinstance(value, str) and not isinstance(value, Number):
        return value
    if isinstance(value, bool) or not isinstance(value, Number | int | float | Decimal):
        raise ValueError(
            f"is {str(value)[:100]} ({type(value).__name__}), not a text or a number: write it as text, or "
            "let the column's name lead into nested ones, e.g. reward_model.ground_truth"
        )
    short = text = str(value)
    if len(text) > 40:
        short = f"{text[:20]}...{text[-8:]}"
    if isinstance(value, float) and (narrow or (value.is_integer() and abs(value) > _EXACT)):
        raise ValueError(
            f"is {text} of a float column, where digits may be lost: write it as text or as an integer"
        )
    too_long = ValueError(
        f"is {short}, a number of over {_MOST_DIGITS} digits, which nothing here can compare"
    )
    try:
        number = Decimal(text)
    except InvalidOperation:  # of the exponent
        raise too_long from None
    if not number.is_finite():
        raise ValueError(f"is {text}, not a number: perhaps it is missing; leave the row out")
    if number and max(abs(number.adjusted()), len(number.as_tuple().digits)) >= _MOST_DIGITS:
        raise too_long
    whole, _, decimals = format(number if number else Decimal(0), "f").partition(".")
    if isinstance(value, Decimal):
        decimals = decimals.rstrip("0")  # its column's type writes 0.50 for 0.5
    return f"{whole}.{decimals}" if decimals.strip("0") else whole


def _is_text(text: str) -> bool:
    """Whether a text has no NUL and no half character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def task_of(suite: Suite, recipe: Recipe | None) -> Task:
    """The settings of a suite's task: the recipe's, with the suite's file in place of its data.

    The file has the recipe's columns, or `problem` and `answer`. Raises RecipeError where it has neither,
    and where a suite needs a recipe and there is none.
    """
    if not suite.is_file:
        if recipe is None:
            raise RecipeError(f"--suite {suite.source} needs a RUN, or --recipe for its task")
        return recipe.task
    if recipe is None:
        return DatasetTask(kind="dataset", path=suite.source, held_out=0.0)
    if isinstance(recipe.task, AdditionTask):
        raise RecipeError(
            f"--suite {suite.source}: the recipe's task is {recipe.task.kind}, which reads no files; "
            f"ask for {suite.HELD_OUT} or {suite.TRAINING}"
        )
    choices = dict.fromkeys([(recipe.task.problem, recipe.task.answer), ("problem", "answer")])
    problem, answer = columns(Path(suite.source), list(choices), "suite")
    changes: dict[str, Any] = {"problem": problem, "answer": answer, "held_out": 0.0}
    if isinstance(recipe.task, EnvironmentTask):
        changes["problems"] = suite.source
    else:
        changes |= {"path": suite.source, "name": None, "config": None, "revision": None}
    return recipe.task.model_copy(update=changes)
