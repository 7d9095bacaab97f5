"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megatron_fp16rl.utils.errors import FinalError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.save says of a file, given by its name, that it cannot write to its end (torch 2.13).
_TORCH_SAVE_FAILED = ("iostream error", "unexpected pos", "PytorchStreamWriter failed writing file")
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


class Unreadable(FinalError):
    """A file is not what was written there. The message names it, and says what is wrong."""


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes `text` through a temporary file, fsync and rename, with permission bits `mode`."""
    write_bytes(path, text.encode(), mode)


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """As `write_text`. Raises OSError, for what is no plain file too: a rename would replace a device."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "there is something that is no plain file", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", error.filename) from None
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: object, mode: int = 0o644) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n", mode)


def write_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Writes JSON values, one a line, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path, shape: type = dict) -> Any:
    """The JSON value in a file, which is to be a `shape` (dict or list). Raises Unreadable."""
    try:
        return parse_json(path.read_bytes(), shape)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Unreadable(f"{path} cannot be read: {reason}") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line. Raises Unreadable, which names the line."""
    rows = []
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                rows.append(parse_json(line))
            except ValueError as error:
                raise Unreadable(f"{path}, line {number}, cannot be read: {error}") from None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    return rows


def parse_json(text: bytes, shape: type = dict) -> Any:
    """A JSON value of a shape, in UTF-8 and without NaN or Infinity. Raises ValueError."""
    if not text.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(text.decode(), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, shape):
        name = "an object" if shape is dict else "a list"
        raise ValueError(f"it holds no JSON value that is {name}: {str(value)[:40]!r}")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


@contextmanager
def new_folder(path: Path, keep_old: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` if the block succeeds, replacing an old one.

    Whatever stood at `path` stays until the new folder is complete. keep_old: it stays for good, and
    the new one goes; for caches, which several processes may fill at once with the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if keep_old:
            try:
                os.replace(temporary, path)
            except OSError:
                if not path.is_dir():
                    raise
                shutil.rmtree(temporary)
        elif path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes renames in a folder last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether no space left on a disk or of a quota, or a limit on a file's size, is behind an error."""
    return any(
        # safetensors, and torch from another rank, pass on the text alone; torch.save not even that.
        (isinstance(e, OSError) and e.errno in _FULL)
        or any(text in str(e) for text in (*map(os.strerror, _FULL), *_TORCH_SAVE_FAILED))
        for e in _chain(error)
    )


def is_refused(error: BaseException) -> bool:
    """Whether a file system that is read-only, or permissions, are behind an error."""
    return any(isinstance(e, OSError) and e.errno in _REFUSED for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and while what."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
