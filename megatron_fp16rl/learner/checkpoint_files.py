"""A run's checkpoints on disk: which there are, whether they are whole, which may go.

    checkpoints/step_50/            complete, because it got this name when it was
    checkpoints/latest -> step_50   for people; what counts is the highest step
    checkpoints/.step_75.x1y2       being written, or left by a run that was killed

`step_N` is the state before step N. Nothing here needs torch.
"""

import hashlib
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import sync_folder, write_json

MANIFEST, LATEST = "manifest.json", "latest"
_NAME = re.compile(r"step_(0|[1-9][0-9]*)")  # whole: editors and people leave step_30~, step_30.bak
_SET_ASIDE = "set_aside"
_CHUNK_BYTES = 1 << 22

Digests = dict[str, dict[str, object]]  # of files by name: {"bytes": size, "sha256": digest}


class CheckpointError(FinalError):
    """A checkpoint that cannot be used. The message names file and remedy."""


class Damaged(CheckpointError):
    """A checkpoint is not what was written. An earlier one may be. `what` is wrong with it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}. {remedy}")
        self.what = what


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path

    @property
    def step(self) -> int:
        """The step to go on with."""
        return int(_NAME.fullmatch(self.path.name)[1])

    def files(self) -> Digests:
        """What the manifest says there is. Raises CheckpointError."""
        manifest = self.path / MANIFEST
        try:
            said = TypeAdapter(_Manifest).validate_json(manifest.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{manifest} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"{manifest} is not what was written: {where and where + ': '}{first['msg']}"
            ) from None
        if not said["files"]:
            raise CheckpointError(f"{manifest} is not what was written: it names no file")
        if _NAME.fullmatch(self.path.name) and said["step"] != self.step:
            raise CheckpointError(f"{self.path} was written as step_{said['step']}, and renamed")
        return said["files"]

    def faults(self, names: Iterable[str] | None = None) -> list[str]:
        """What is wrong with the checkpoint: nothing, if the list is empty.

        names: the files whose content is compared with its checksum; None compares sizes only.
        """
        try:
            files = self.files()
        except CheckpointError as error:
            return [str(error)]
        found = []
        for name, expected in files.items():
            found += _reading(self.path / name, lambda file, e=expected: _check_size(file, e))
        for name in names or []:
            if not found:
                expected = files[name]
                found += _reading(self.path / name, lambda file, e=expected: _check_sum(file, e))
        return found


class _Digest(TypedDict):
    bytes: NonNegativeInt
    sha256: str


class _Manifest(TypedDict):
    step: NonNegativeInt
    files: dict[str, _Digest]


def _reading(file: Path, check: Callable[[Path], str | None]) -> list[str]:
    """What is wrong with a file; that it cannot be read counts, too."""
    try:
        wrong = check(file)
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    return [f"{file} {wrong}"] if wrong else []


def _check_size(file: Path, expected: _Digest) -> str | None:
    if not file.is_file():
        return "is no file" if file.exists() else "is missing"
    if (size := file.stat().st_size) != expected["bytes"]:
        return f"has {size} bytes, not {expected['bytes']}: it was cut short"
    return None


def _check_sum(file: Path, expected: _Digest) -> str | None:
    same = digest(file) == expected
    return None if same else "is not what was written: its checksum differs"


def available(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else []
    found = [Checkpoint(p) for p in paths if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def refusal(checkpoint: Checkpoint, faults: list[str]) -> Damaged:
    """The error for a checkpoint with faults; it offers the newest one before it that seems whole."""
    others = available(checkpoint.path.parent) if _NAME.fullmatch(checkpoint.path.name) else []
    whole = next((c for c in others if c.step < checkpoint.step and not c.faults()), None)
    run = checkpoint.path.parent.parent
    remedy = (
        f"The one before is whole: fp16rl train --resume {run} --at {whole.step}"
        if whole
        else "There is no earlier one that is: start anew"
    )
    return Damaged("; ".join(faults[:3]), remedy)


def begin(folder: Path, step: int) -> Path:
    """A folder to write a checkpoint into; `commit` makes it one. Removes what a killed run left."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*"):
        _remove(leftover)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".step_{step}."))
    temporary.chmod(0o755)
    return temporary


def commit(temporary: Path, step: int, files: Digests) -> Checkpoint:
    """Writes the manifest and gives the folder its name: from now on it is a checkpoint.

    The files must be synced to disk already.
    """
    folder = temporary.parent
    write_json(temporary / MANIFEST, {"step": step, "files": dict(sorted(files.items()))})
    final = folder / f"step_{step}"
    if os.path.lexists(final):  # an earlier attempt got as far
        _discard(final)
    os.replace(temporary, final)
    sync_folder(folder)
    _point(folder / LATEST, final.name)
    return Checkpoint(final)


def digest(file: Path) -> dict[str, object]:
    """Size and SHA-256 of a file, which is synced to disk on the way."""
    checksum, size = hashlib.sha256(), 0
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        while chunk := handle.read(_CHUNK_BYTES):
            checksum.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": checksum.hexdigest()}


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Removes checkpoints, but not the last few, nor those at multiples of `keep_every` steps."""
    for checkpoint in available(folder)[keep_last:]:
        if not keep_every or checkpoint.step % keep_every:
            _discard(checkpoint.path)


def set_aside_after(folder: Path, step: int) -> None:
    """Moves checkpoints newer than `step_<step>` out of the way, into a folder beside them.

    Raises CheckpointError if there is no checkpoint at that step.
    """
    found = available(folder)
    if step not in [c.step for c in found]:
        steps = ", ".join(str(c.step) for c in reversed(found)) or "none"
        raise CheckpointError(f"{folder} has no checkpoint at step {step}; there are: {steps}")
    for checkpoint in found:
        if checkpoint.step > step:
            set_aside(checkpoint)


def set_aside(checkpoint: Checkpoint) -> None:
    """Moves a checkpoint out of the way, into a folder beside the others."""
    folder = checkpoint.path.parent
    place = Path(tempfile.mkdtemp(dir=_made(folder / _SET_ASIDE), prefix="at_"))
    os.replace(checkpoint.path, place / checkpoint.path.name)
    if rest := available(folder):
        _point(folder / LATEST, rest[0].path.name)


def space_report(run: Path) -> str:
    """How much is free where a run's directory is, what it needs, and what to do."""
    folder = run / "checkpoints"
    free = f"{_mib(shutil.disk_usage(run).free)} free (a quota may leave less)"
    if (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY:
        free += f", and no file may have more than {_mib(limit)} here: raise ulimit -f"
    if half := [f for f in folder.glob(".step_*/**/*") if f.is_file()]:
        free += f" beside an unfinished checkpoint of {_mib(sum(f.stat().st_size for f in half))}"
    newest = next((c for c in available(folder) if not c.faults()), None)
    needs = "there is no checkpoint yet that says how much is needed"
    if newest is not None:
        needs = f"a checkpoint needs {_mib(sum(f['bytes'] for f in newest.files().values()))}"
    return (
        f"{run} has {free}; {needs}. Make room, or keep fewer checkpoints (checkpoint.keep_last, "
        f"keep_every); then: fp16rl train --resume {run}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _discard(path: Path) -> None:
    """Removes a checkpoint, under another name: half removed it must not pass for one."""
    doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.replace(path, doomed / path.name)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Removes what is there, be it a folder, a file or a link.

    What cannot be removed is left for the next `begin`: on NFS a file that somebody has open stays as
    .nfs..., and its folder with it.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}")
    _remove(temporary)
    temporary.symlink_to(target)
    if link.is_dir() and not link.is_symlink():  # a run that was copied without its links
        os.replace(link, Path(tempfile.mkdtemp(dir=_made(link.parent / _SET_ASIDE))) / link.name)
    os.replace(temporary, link)
    sync_folder(link.parent)
