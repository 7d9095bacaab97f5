"""The lock of a run directory: one process works on a run at a time, however it was started.

RUN/.lock is locked (flock) by the supervisor of the run, or by rank 0 under mpirun, as long as that process
lives; the kernel frees it, however the process ends. The file names the owner: host, process id, and the
number of its job.

Some file systems have no locks, e.g. Lustre mounted without -o flock. There the file's content counts: the
owner is gone if its process or its job is; a process of another host is taken to be alive.

Standard library and Python 3.9 only: see launch/supervisor.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.processes import answer

LOCK_FILE = ".lock"
HELD = "FP16RL_LOCK_HELD"  # tells ranks that their supervisor holds the lock
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_POLL_S = 0.1
_SLURM_TIMEOUT_S = 20


class RunInUse(FinalError):
    """Another process, or a job, works in the run directory. The message says which."""


@dataclass(frozen=True)
class Owner:
    """Who works in a run directory.

    pid: 0 if it is not known; job: that it belongs to; is_sure: False where there is no lock, only a name.
    """

    host: str
    pid: int
    job: str | None = None
    is_sure: bool = True

    def __str__(self) -> str:
        if self.job is not None:
            text = f"job {self.job}, on {self.host}"
        else:
            text = f"process {self.pid} on {self.host}" if self.pid else "an unknown process"
        if not self.is_sure:
            text += f" (the file system has no locks: if that has ended, remove {LOCK_FILE} there)"
        return text


@contextlib.contextmanager
def alone_in(folder: Path, job: str | None = None, patience_s: float = 1.0) -> Iterator[None]:
    """Holds the run directory's lock until this block, or this process, ends.

    job: that this process belongs to. Raises RunInUse if another holds the lock for `patience_s`.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + patience_s
        # `holder` may have the lock for an instant.
        while (owner := _lock(descriptor, fcntl.LOCK_EX, job)) is not None:
            if time.monotonic() > deadline:
                raise RunInUse(
                    f"{folder} is in use by {owner}; wait, or end it: fp16rl cancel {folder} --save"
                )
            time.sleep(_POLL_S)
        line = " ".join([socket.gethostname(), str(os.getpid()), job or ""]).encode()
        os.pwrite(descriptor, line, 0)  # cut to length after that: the file is never empty
        os.ftruncate(descriptor, len(line))
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(folder: Path) -> Owner | None:
    """Who works in a run directory, if somebody does."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int, job: str | None = None) -> Owner | None:
    """Takes the lock if it is free; returns who has it if not. An exclusive one stays taken."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(descriptor)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = _named(descriptor)
        return None if _is_gone(owner, job) else replace(owner, is_sure=False)
    return None


def _named(descriptor: int) -> Owner:
    """The owner that the file names; one without process id if it does not."""
    words = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    if len(words) in (2, 3) and words[1].isascii() and words[1].isdecimal():
        return Owner(words[0], int(words[1]), words[2] if words[2:] else None)
    return Owner("", 0)


def _is_gone(owner: Owner, job: str | None) -> bool:
    """Whether nobody is named, or it is sure that the owner has ended. job: that asks."""
    if owner.job is not None:
        # A job that Slurm requeued has the number that it had before.
        return owner.job == job or _has_ended(owner.job)
    if not owner.pid:
        return True
    return owner.host == socket.gethostname() and not Path(f"/proc/{owner.pid}").exists()


def _has_ended(job: str) -> bool:
    """Whether Slurm answers that no such job waits or runs."""
    command = ["squeue", "-h", "-j", job, "-o", "%T"]
    try:
        done = answer(command, _SLURM_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return not done.stdout.strip() and (not done.returncode or "Invalid job id" in done.stderr)
