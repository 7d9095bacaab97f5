"""A run's checkpoints on disk: which exist, whether they are intact, which may be removed.

    checkpoints/step_50/            complete: it gets this name last
    checkpoints/latest -> step_50   for people; what counts is the highest step
    checkpoints/.step_75.x1y2       being written, or left by a run that was killed

`step_N` is the state before step N. Nothing here imports torch.
"""

import hashlib
import os
import pickle
import re
import resource
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from megatron_fp16rl.recipe import Lora
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import read_json, sync_folder, write_json

MANIFEST, LATEST = "manifest.json", "latest"
STATE, DESCRIPTION = "state.json", "hf"
_NAME = re.compile(r"step_(0|[1-9][0-9]*)")  # matched in full: people leave step_30~, step_30.bak
_SET_ASIDE = "set_aside"
_CHUNK_BYTES = 1 << 22

# What torch's index of a checkpoint's tensors may hold.
_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        "BytesStorageMetadata",  # of what all ranks share, since megatron-core 0.19
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float16", "bfloat16", "float32", "int64"),
    "pathlib": ("PosixPath",),
}


class CheckpointError(FinalError):
    """A checkpoint that cannot be used. The message names file and remedy."""


class Damaged(CheckpointError):
    """A checkpoint is not what was written. An earlier one may be. `what` is wrong with it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}. {remedy}")
        self.what = what


class Digest(TypedDict):
    """Of a file."""

    bytes: NonNegativeInt
    sha256: str


Digests = dict[str, Digest]  # by file name


class _Manifest(TypedDict):
    step: NonNegativeInt
    files: Digests


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path

    @property
    def step(self) -> int:
        """The step to go on with."""
        return int(self.path.name.removeprefix("step_"))

    def files(self) -> Digests:
        """The files that the manifest lists. Raises CheckpointError."""
        file = self.path / MANIFEST
        try:
            manifest = TypeAdapter(_Manifest).validate_json(file.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise CheckpointError(f"{file} is not what was written: {reason}") from None
        renamed = _NAME.fullmatch(self.path.name) and manifest["step"] != self.step
        if renamed or not manifest["files"]:
            raise CheckpointError(
                f"{file} is not what was written: it is of step {manifest['step']} and has "
                f"{len(manifest['files'])} files"
            )
        return manifest["files"]

    def faults(self, names: Iterable[str] = ()) -> list[str]:
        """What is wrong with the checkpoint: nothing, if the list is empty.

        names: the files whose content is compared with its checksum; of all others, the size is.
        """
        try:
            files = self.files()
        except CheckpointError as error:
            return [str(error)]
        sizes = [_fault(self.path / name, files[name], read=False) for name in files]
        if any(sizes):  # a file that was cut short need not be read
            return list(filter(None, sizes))
        return list(filter(None, (_fault(self.path / n, files[n], read=True) for n in names)))

    def state(self) -> dict[str, Any]:
        """What is no tensor of a learner's state. Raises CheckpointError if there is none."""
        file = self.path / STATE
        if not file.exists():
            raise CheckpointError(
                f"{self.path} holds parameters only, no optimizer: it cannot be resumed. Make a "
                "Hugging Face folder of it (fp16rl convert to-hf) and name that as model.path"
            )
        return read_json(file)

    def lora(self) -> Lora | None:
        """The LoRA settings it was made with: a model must have the same to load it."""
        settings = self.state().get("lora") if (self.path / STATE).exists() else None
        return settings and Lora.model_validate(settings)

    def check_same_model(self, hf_dir: Path, lora: Lora | None) -> None:
        """Raises CheckpointError if it is of another model than that of `hf_dir`, or of other adapters."""
        settings = lora and lora.model_dump()
        if (saved_lora := self.state().get("lora")) != settings:
            raise CheckpointError(
                f"{self.path} was made with learner.lora={saved_lora}, the recipe has {settings}: resume "
                "with the same, or begin a new run from the old one's export/ (model.path)"
            )
        saved, current = (
            read_json(folder / "config.json") for folder in (self.path / DESCRIPTION, hf_dir)
        )
        ignored = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}
        ignored |= {"architectures", "quantization_config"}
        differing = [
            f"{key}: {saved.get(key)!r} there, {current.get(key)!r} here"
            for key in sorted({*saved, *current} - ignored)
            if saved.get(key) != current.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"{self.path} is of another model than the recipe's ({'; '.join(differing[:3])})"
            )

    def check_index(self) -> None:
        """Raises CheckpointError if torch's index of the tensors, a pickle, holds foreign types.

        torch reads it with pickle.load, which would run any code that a stranger put there.
        """
        with (self.path / ".metadata").open("rb") as file:
            _TensorIndex(file).load()


class _TensorIndex(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise CheckpointError(
                f"a checkpoint's .metadata holds {module}.{name}, which no checkpoint of ours does: "
                "it was tampered with, do not use it"
            )
        return super().find_class(module, name)


def _fault(file: Path, expected: Digest, read: bool) -> str | None:
    """What is wrong with a file, if anything. read: compare its content, and not only its size."""
    try:
        if not file.is_file():
            return f"{file} {'is no file' if file.exists() else 'is missing'}"
        if (size := file.stat().st_size) != expected["bytes"]:
            return f"{file} has {size} bytes, not {expected['bytes']}: it was cut short"
        if read and digest(file) != expected:
            return f"{file} is not what was written: its checksum differs"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None


def available(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    checkpoints = [Checkpoint(p) for p in paths if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(checkpoints, key=lambda checkpoint: -checkpoint.step)


def refusal(checkpoint: Checkpoint, faults: list[str]) -> Damaged:
    """The error for a damaged checkpoint; it names the newest earlier one that seems intact."""
    others = available(checkpoint.path.parent) if _NAME.fullmatch(checkpoint.path.name) else []
    intact = next((c for c in others if c.step < checkpoint.step and not c.faults()), None)
    remedy = "There is no earlier one that is: start anew"
    if intact:
        run = checkpoint.path.parent.parent
        remedy = f"The one before is whole: fp16rl train --resume {run} --at {intact.step}"
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


def digest(file: Path) -> Digest:
    """Size and SHA-256 of a file, which is synced to disk first."""
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
    checkpoints = available(folder)
    if step not in [c.step for c in checkpoints]:
        steps = ", ".join(str(c.step) for c in reversed(checkpoints)) or "none"
        raise CheckpointError(f"{folder} has no checkpoint at step {step}; there are: {steps}")
    for checkpoint in checkpoints:
        if checkpoint.step > step:
            set_aside(checkpoint)


def set_aside(checkpoint: Checkpoint) -> None:
    """Moves a checkpoint out of the way, into a folder beside the others."""
    folder = checkpoint.path.parent
    _move_aside(checkpoint.path)
    if rest := available(folder):
        _point(folder / LATEST, rest[0].path.name)


def _move_aside(path: Path) -> None:
    folder = path.parent / _SET_ASIDE
    folder.mkdir(exist_ok=True)
    os.replace(path, Path(tempfile.mkdtemp(dir=folder, prefix="at_")) / path.name)


def space_report(run: Path) -> str:
    """How much space a run's directory has, and what to do."""
    free = f"{shutil.disk_usage(run).free / 2**20:,.1f} MiB free (a quota may leave less)"
    if (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY:
        free += f", and no file may have more than {limit / 2**20:,.1f} MiB here: raise ulimit -f"
    return (
        f"{run} has {free}. Make room, or keep fewer checkpoints (checkpoint.keep_last, keep_every); "
        f"then: fp16rl train --resume {run}"
    )


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


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}")
    _remove(temporary)
    temporary.symlink_to(target)
    if link.is_dir() and not link.is_symlink():
        _move_aside(
            link
        )  # of a run copied without its links: perhaps the only copy of a checkpoint
    os.replace(temporary, link)
    sync_folder(link.parent)
