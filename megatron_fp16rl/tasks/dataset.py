"""Problems and answers from JSONL and Parquet files, and from Hugging Face data sets."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_fp16rl.recipe import DatasetTask, RecipeError

Row = dict[str, object]


def load(settings: DatasetTask) -> list[tuple[str, str]]:
    """(problem, answer) of every row of a task's data. Raises RecipeError."""
    if settings.path is not None:
        return read_problems(Path(settings.path), settings.problem, settings.answer)
    return _from_hugging_face(settings)


def read_problems(
    path: Path, problem: str = "problem", answer: str = "answer"
) -> list[tuple[str, str]]:
    """(problem, answer) of every row of a JSONL or Parquet file.

    problem, answer: columns; dots lead into nested ones and numbers into lists. Raises RecipeError
    naming file, line or row, and what is wrong.
    """
    if not path.is_file():
        raise RecipeError(f"task.path: there is no file {path}; give one with --set task.path=FILE")
    if path.suffix == ".parquet":
        return _pairs(_parquet_rows(path), problem, answer)
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise RecipeError(f"task.path={path}: the file must end in .jsonl or .parquet")
    return _pairs(_json_rows(path), problem, answer)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(
                    f"{path}:{number}: want one JSON object a line; {error}"
                ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield f"{path}: row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(f"{path} is not a Parquet file: {error}") from None


def _from_hugging_face(settings: DatasetTask) -> list[tuple[str, str]]:
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
    return _pairs(rows, settings.problem, settings.answer)


def _pairs(rows: Iterable[tuple[str, Row]], problem: str, answer: str) -> list[tuple[str, str]]:
    pairs = [
        (_text(row, problem, "problem", where), _text(row, answer, "answer", where))
        for where, row in rows
    ]
    if not pairs:
        raise RecipeError("the task's data (task.path, task.name) holds no problems")
    return pairs


def _text(row: Row, column: str, key: str, where: str) -> str:
    """What stands in a column, perhaps a nested one."""
    value: object = row
    for name in column.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, TypeError, ValueError):
            known = f"has {', '.join(row)}" if isinstance(row, dict) else "is no object"
            raise RecipeError(
                f"{where}: there is no {column!r} (task.{key} names the column); the row {known}"
            ) from None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecipeError(
            f"{where}: {column!r} is {str(value)[:100]}, not a text or a number; task.{key} may lead "
            "into nested columns, e.g. reward_model.ground_truth"
        )
    return str(value)
