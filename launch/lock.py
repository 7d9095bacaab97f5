"""The lock of a run directory: one process works on a run at a time, however it was started.

RUN/.lock is locked (flock) by the supervisor of the run, or by rank 0 under mpirun, as long as that process
lives; the kernel frees it, however the process ends. The file names the owner: host,
process id, and the number of its job. A file system without locks is refused.

Standard library and Python 3.9 only: see launch/supervisor.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.utils.errors import FinalError

LOCK_FILE = ".lock"
HELD = "FP16RL_LOCK_HELD"  # tells ranks that their supervisor holds the lock
_POLL_S = 0.1


class RunInUse(FinalError):
    """Another process, or a job, works in the run directory. The message says which."""


class NoLocks(FinalError):
    """The file system of a run directory has no locks. The message says what to do."""


@dataclass(frozen=True)
class Owner:
    """Who works in a run directory. pid: 0 if it is not known; job: that it belongs to."""

    host: str
    pid: int
    job: str | None = None

    def __str__(self) -> str:
        if self.job is not None:
            return f"job {self.job}, on {self.host}"
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process"


@contextlib.contextmanager
def alone_in(folder: Path, job: str | None = None, patience_s: float = 1.0) -> Iterator[None]:
    """Holds the run directory's lock until this block, or this process, ends.

    job: that this process belongs to. Raises RunInUse if another holds the lock for `patience_s`.
    """
    with (folder / LOCK_FILE).open("a+", opener=_private) as file:
        deadline = time.monotonic() + patience_s
        while not _lock(
            file.fileno(), fcntl.LOCK_EX, folder
        ):  # `holder` may have it for an instant
            if time.monotonic() > deadline:
                owner = _named(file.fileno())
                raise RunInUse(
                    f"{folder} is in use by {owner}; wait, or end it: fp16rl cancel {folder} --save"
                )
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(" ".join([socket.gethostname(), str(os.getpid()), job or ""]))
        file.flush()
        yield
        file.truncate(0)


def holder(folder: Path) -> Owner | None:
    """Who works in a run directory, if somebody does."""
    try:
        with (folder / LOCK_FILE).open() as file:
            free = _lock(file.fileno(), fcntl.LOCK_SH, folder)
            return None if free else _named(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lock(descriptor: int, kind: int, folder: Path) -> bool:
    """Takes the lock if it is free; an exclusive one stays taken. Raises NoLocks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocks(
            f"the file system of {folder} has no locks ({error.strerror}), so two jobs could write one run: "
            "put runs on another (trainer.run_root), or have it mounted with them (Lustre: -o flock)"
        ) from None
    return True


def _named(descriptor: int) -> Owner:
    """The owner that the file names; one without process id if it does not."""
    words = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    if len(words) in (2, 3) and words[1].isascii() and words[1].isdecimal():
        return Owner(words[0], int(words[1]), *words[2:])
    return Owner("", 0)
