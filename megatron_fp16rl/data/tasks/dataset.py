"""Problems and answers from JSONL and Parquet files, and from Hugging Face data sets.

What would be read otherwise than its author meant is refused, by file and line or row.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.data.tasks.values import Number, as_text
from megatron_fp16rl.recipe import DatasetTask, FunctionReward, HttpReward, RecipeError

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
Rows = Iterable[tuple[str, Row]]  # each with where it stands
_ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet")


def load(settings: DatasetTask) -> list[tuple[str, str]]:
    """(problem, answer) of every row of a task's data. Raises RecipeError."""
    # Whoever grades in another way may have no use for an answer.
    blank = isinstance(settings.reward, FunctionReward | HttpReward)
    if settings.path is not None:
        path = Path(settings.path)
        return read_problems(path, settings.problem, settings.answer, blank_answers=blank)
    return _from_hugging_face(settings, blank)


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
    rows = _rows(path, key)
    is_parquet = path.suffix == ".parquet" and path.is_file()
    schema = _parquet_schema(path) if is_parquet else None
    return _pairs(f"{key}={path}", rows, problem, answer, blank_answers, schema)


def columns(path: Path, choices: Sequence[tuple[str, str]], key: str) -> tuple[str, str]:
    """The first of some pairs of columns that the file's first row has. key: that names the file.

    Raises RecipeError if there is none.
    """
    for where, row in _rows(path, key):
        for pair in choices:
            if all(_has(row, name) for name in pair):
                return pair
        wanted = ", or ".join(" and ".join(map(repr, pair)) for pair in choices)
        raise RecipeError(f"{where}: {key} wants the columns {wanted}; the row {_known(row)}")
    raise RecipeError(f"{key}: {path} holds no problems")


def read_sums(path: Path) -> list[tuple[int, int]]:
    """The (a, b) of a file of problems such as `27+85=`. Raises RecipeError."""
    pairs = []
    for problem, _ in read_problems(path, key="task.problems"):
        found = re.fullmatch(r"(\d{1,100})\+(\d{1,100})=", problem)
        if found is None:
            raise RecipeError(f"task.problems={path}: {problem!r} is no sum such as '27+85='")
        pairs.append((int(found[1]), int(found[2])))
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
            if "\0" in line or not _is_unicode(line):
                raise RecipeError(
                    f"{where}: the file is not UTF-8 text (Latin-1, UTF-16, compressed?): convert it, e.g. "
                    f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8.jsonl, or it was damaged"
                )
            try:
                yield (
                    where,
                    json.loads(
                        line, parse_int=Number, parse_float=Number, object_pairs_hook=_object
                    ),
                )
            except json.JSONDecodeError as error:
                raise RecipeError(f"{where}: want one JSON object a line; {error}") from None
            except (RecursionError, _DoubledKey) as error:
                raise RecipeError(f"{where}: {error}") from None


class _DoubledKey(ValueError):
    """An object has a key twice: whichever is taken, the other was meant."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DoubledKey(f"the key {twice!r} is there twice")
    return made


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


def _parquet_schema(path: Path) -> "pyarrow.Schema":
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise RecipeError(f"{path} is not a Parquet file: {error}") from None


def _from_hugging_face(settings: DatasetTask, blank_answers: bool) -> list[tuple[str, str]]:
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
    wanted = (settings.problem, settings.answer)
    return _pairs(named, rows, *wanted, blank_answers, data.features.arrow_schema)


def _pairs(
    source: str,
    rows: Rows,
    problem: str,
    answer: str,
    blank_answers: bool,
    schema: "pyarrow.Schema | None" = None,
) -> list[tuple[str, str]]:
    bits = _float_bits(schema, problem), _float_bits(schema, answer)
    pairs = [
        (
            _text(row, problem, "problem", where, bits[0]),
            _text(row, answer, "answer", where, bits[1], blank_answers),
        )
        for where, row in rows
    ]
    if not pairs:
        raise RecipeError(f"{source} holds no problems")
    return pairs


def _text(
    row: Row, column: str, key: str, where: str, bits: int, may_be_blank: bool = False
) -> str:
    """What stands in a column, perhaps a nested one."""
    try:
        value = _find(row, column)
    except (KeyError, IndexError, TypeError, ValueError):
        raise RecipeError(
            f"{where}: there is no {column!r} (task.{key} names the column); the row {_known(row)}"
        ) from None
    try:
        text = as_text(value, bits)
    except ValueError as error:
        raise RecipeError(f"{where}: {column!r} {error}") from None
    if not text.strip() and not may_be_blank:
        raise RecipeError(f"{where}: {column!r} (task.{key}) is empty: leave the row out")
    if "\0" in text or not _is_unicode(text):
        raise RecipeError(
            f"{where}: {column!r} holds a NUL or half a character (a lone surrogate), which no tokenizer "
            f"reads: {text[:60]!a}"
        )
    return text


def _find(row: Row, column: str) -> Any:
    """The value of a column of just that name, else of the one that its dots lead to."""
    if isinstance(row, dict) and column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    return value


def _has(row: Row, column: str) -> bool:
    try:
        _find(row, column)
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    return True


def _known(row: Any) -> str:
    return f"has {', '.join(map(str, row))}" if isinstance(row, dict) else "is no object"


def _float_bits(schema: "pyarrow.Schema | None", column: str) -> int:
    """Of the floats in a column: Python has but one kind of them, in which float32's 0.1 is another."""
    if schema is None:
        return 64
    import pyarrow

    kind = pyarrow.struct(schema)
    for name in [column] if column in schema.names else column.split("."):
        if pyarrow.types.is_struct(kind):
            if kind.get_field_index(name) < 0:
                return 64  # there is no such column, as the first row says
            kind = kind.field(name).type
        else:
            kind = getattr(kind, "item_type", None) or getattr(kind, "value_type", kind)
    kind = getattr(kind, "value_type", kind)  # of a dictionary
    return {pyarrow.float32(): 32, pyarrow.float16(): 16}.get(kind, 64)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
