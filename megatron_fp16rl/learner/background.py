"""Checkpoints that other processes write while training goes on (`checkpoint.background`).

1. Between two steps, each rank writes its tensors as for any checkpoint, but into host memory. All
   else, a few small files, goes to the disk at once.
2. A process of each rank copies that memory to the disk, and syncs and checksums files; see
   checkpoint_writer.py. It is a new program, no fork: of CUDA, NCCL and threads a child of the rank could
   touch nothing.
3. At the end of the step in which all have finished, the folder gets its name.

Megatron-core's own way (0.16.1, `async_sharded_save`) forks the rank, or a worker that outlives a rank
that is killed; asks for CUDA; and has no checksums.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem

from megatron_fp16rl.learner import checkpoint
from megatron_fp16rl.learner.checkpoint import Progress
from megatron_fp16rl.learner.checkpoint_files import Checkpoint, prune
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe.run import Checkpoint as Settings
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import parse_json
from megatron_fp16rl.utils.processes import spawn

_WRITER = "megatron_fp16rl.learner.checkpoint_writer"


class NotWritten(ExplainedError):
    """A process that wrote a checkpoint has ended before it was whole."""


class _HostMemory(FileSystem):
    """A disk to torch, but for a rank's file of tensors, which stays in host memory.

    The memory is anonymous: it is gone with the last process that has it, however that ends, and the
    size of /dev/shm is no limit. It is kept from one checkpoint to the next, and counts to this rank.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("checkpoint")
        self.name = ""  # of the file that is in memory

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        if not str(path).endswith(DEFAULT_SUFFIX):
            with super().create_stream(path, mode) as file:
                yield cast(IO[bytes], file)
            return
        self.name = Path(path).name
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self.descriptor), mode) as memory:
            yield memory  # what is there is overwritten: pages that exist cost half as much
        # Both numbers have one position: where torch stopped.
        os.ftruncate(self.descriptor, os.lseek(self.descriptor, 0, os.SEEK_CUR))


@dataclass
class _Writer:
    """The process that writes this rank's files, and where it says what it has written."""

    process: subprocess.Popen
    report: IO[bytes]

    @classmethod
    def start(cls, folder: Path, memory: _HostMemory, names: list[str]) -> "_Writer":
        """Starts it. names: files in `folder` to checksum."""
        report = os.fdopen(os.memfd_create("report"), "rb")
        command = [sys.executable, "-m", _WRITER, str(folder)]
        command += [memory.name, str(memory.descriptor), *names]
        # Slurm sends SIGTERM to every process of a job that it preempts. The rank takes note, and waits for
        # its writer, which must live: it inherits what is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            process = spawn(
                *(command, Path(os.devnull)),
                stdout=report,
                stderr=None,  # the rank's own log
                pass_fds=(memory.descriptor,),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return cls(process, report)

    def result(self, wait: bool) -> dict[str, Any] | None:
        """What it says at its end: its files' "digests", or an error. None: it is not done."""
        code = self.process.wait() if wait else self.process.poll()
        if code is None:
            return None
        if code == 0:
            self.report.seek(0)
            return parse_json(self.report.read())
        killed = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has failed ({code})"
        )
        return {"died": killed}


@dataclass
class _Pending:
    folder: Path
    step: int
    writer: _Writer


class Saver:
    """Saves a run's checkpoints, one at a time, and removes old ones. Every method is collective over the world."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        self._memory: _HostMemory | None = None
        self._pending: _Pending | None = None

    def begin(
        self,
        learner: Learner,
        folder: Path,
        progress: Progress,
        hf_dir: Path,
        save_more: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Does what `checkpoint.save` does; in the background, it returns when the learner may go on."""
        arguments = (learner, folder, progress, hf_dir, save_more)
        if not self.settings.background:
            self._prune(checkpoint.save(*arguments))
            return
        assert self._pending is None, "the checkpoint before has not ended"
        self._memory = self._memory or _HostMemory()
        temporary = checkpoint.write(*arguments, self._memory)
        names = checkpoint.share_of_files(self.world, temporary)
        writer = _Writer.start(temporary, self._memory, names)
        self._pending = _Pending(temporary, progress.step, writer)

    def end(self, wait: bool) -> None:
        """Makes a checkpoint of what is being written, if it is complete on all ranks. wait: until it is.

        Raises on every rank what went wrong on any: OSError, as if the ranks had written, or NotWritten.
        """
        if self._pending is None:
            return
        step, folder = self._pending.step, self._pending.folder
        results = self.world.gather(self._pending.writer.result(wait))
        for rank, result in enumerate(results):
            if result and "digests" not in result:
                self._pending.writer.process.kill()
                self._pending = None
                raise _error(folder, step, rank, result)
        own = results[self.world.rank]
        if own is not None and None not in results:
            self._pending = None
            self._prune(checkpoint.commit(self.world, folder, step, own["digests"]))

    @property
    def is_writing(self) -> bool:
        return self._pending is not None

    def _prune(self, newest: Checkpoint) -> None:
        if self.world.is_rank0:
            prune(newest.path.parent, self.settings.keep_last, self.settings.keep_every)


def _error(folder: Path, step: int, rank: int, result: dict[str, Any]) -> Exception:
    """Of a writer, by what it ended with."""
    if "errno" in result:
        return OSError(result["errno"], os.strerror(result["errno"]), result["file"])
    run = folder.parent.parent
    return NotWritten(
        f"the process that wrote rank {rank}'s part of {folder.parent}/step_{step} {result['died']}, so there "
        "is none. The one before is whole; to go on from it, if this run does not: "
        f"fp16rl train --resume {run}. With too little host memory: checkpoint.background=false"
    )
