"""A run's checkpoints on disk: which there are, whether they are whole, which may go.

    checkpoints/step_50/            complete, because it got this name when it was
    checkpoints/latest -> step_50   for people; what counts is the highest step
    checkpoints/.step_75.x1y2       being written, or left by a run that was killed

`step_N` is the state before step N. Nothing here needs torch.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.errors import FinalError
from megatron_fp16rl.files import sync_folder, write_json

MANIFEST, LATEST = "manifest.json", "latest"
_NAME = re.compile(r"step_(\d+)$")
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
        return int(_NAME.match(self.path.name)[1])

    def files(self) -> Digests:
        """What the manifest says there is."""
        manifest = self.path / MANIFEST
        try:
            return json.loads(manifest.read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{manifest} cannot be read: {type(error).__name__}: {error}"
            ) from None

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
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                found.append(f"{file} is missing")
            elif size != expected["bytes"]:
                found.append(f"{file} has {size} bytes, not {expected['bytes']}: it was cut short")
        for name in names or []:
            file = self.path / name
            if not found and digest(file) != files[name]:
                found.append(f"{file} is not what was written: its checksum differs")
        return found


def available(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else []
    found = [Checkpoint(p) for p in paths if _NAME.match(p.name) and p.is_dir()]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def refusal(checkpoint: Checkpoint, faults: list[str]) -> Damaged:
    """The error for a checkpoint with faults; it offers the newest one before it that seems whole."""
    older = [c for c in available(checkpoint.path.parent) if c.step < checkpoint.step]
    whole = next((c for c in older if not c.faults()), None)
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
        shutil.rmtree(leftover)
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
    if final.exists():  # an earlier attempt got as far
        shutil.rmtree(final)
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
            # A half-removed folder must not pass for a checkpoint.
            doomed = folder / f".{checkpoint.path.name}.old"
            os.replace(checkpoint.path, doomed)
            shutil.rmtree(doomed)


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
    free = f"{_mib(shutil.disk_usage(run).free)} free"
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


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync_folder(link.parent)
