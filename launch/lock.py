"""The lock of a run directory: one process works on a run at a time, however it was started.

RUN/.lock is locked (flock) by the supervisor of the run, or by rank 0 under mpirun, srun or torchrun, as
long as that process lives; the kernel frees it, however the process ends. The file names the owner: host,
process id, and the number of its job.

Some file systems have no locks, e.g. Lustre mounted without `flock`. There the file's content counts: the
owner is gone if its process or its job is; an owner on another host is taken to be alive.

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
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.utils.errors import FinalError

LOCK_FILE = ".lock"
HELD = "FP16RL_LOCK_HELD"  # tells ranks that their supervisor holds the lock
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_POLL_S = 0.1
_SLURM_TIMEOUT_S = 20


class RunInUse(FinalError):
    """Another process, or a job, works in the run directory. The message says which."""


@dataclass(frozen=True)
class Owner:
    """Who works in a run directory. pid: 0 if it is not known; job: that it belongs to."""

    host: str
    pid: int
    job: str | None = None

    def __str__(self) -> str:
        if self.job is not None:
            return f"job {self.job}, on {self.host}"
        return (
            f"process {self.pid} on {self.host}" if self.pid else "a process that does not say who"
        )


@contextlib.contextmanager
def alone_in(folder: Path, job: str | None = None, patience_s: float = 1.0) -> Iterator[None]:
    """Holds the run directory's lock until this block, or this process, ends.

    job: that this process belongs to; its supervisor may hold the lock already. Raises RunInUse if
    another holds the lock for `patience_s`.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        owner = _take(descriptor, folder, patience_s)
        if owner is not None and (job is None or owner.job != job):
            raise RunInUse(
                f"{folder} is in use by {owner}; wait, or end it: fp16rl cancel {folder} --save"
            )
        if owner is None:
            line = " ".join([socket.gethostname(), str(os.getpid()), *([job] if job else [])])
            data = f"{line}\n".encode()
            os.pwrite(
                descriptor, data, 0
            )  # before it is cut to length: it is never empty on the way
            os.ftruncate(descriptor, len(data))
        yield
        if owner is None:
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
        for _ in range(10):  # an owner holds the lock before the file names it
            if _lock(descriptor, fcntl.LOCK_SH):
                return None
            if (owner := _named(descriptor)) is not None:
                return owner
            time.sleep(_POLL_S)
        return Owner("", 0)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = _named(descriptor)
        return None if owner is None or _is_gone(owner) else owner
    finally:
        os.close(descriptor)


def this_job() -> str | None:
    """The number of the Slurm job that this process belongs to, as `fp16rl status` knows it."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _take(descriptor: int, folder: Path, patience_s: float) -> Owner | None:
    """Takes the lock; returns who has it if that fails. Raises RunInUse where only the file tells."""
    try:
        deadline = time.monotonic() + patience_s
        while not _lock(descriptor, fcntl.LOCK_EX):  # `holder` may have it for an instant
            if time.monotonic() > deadline:
                return _named(descriptor) or Owner("", 0)
            time.sleep(_POLL_S)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = _named(descriptor)
        if owner is not None and not _is_gone(owner):
            raise RunInUse(
                f"{folder} is in use by {owner}, as {LOCK_FILE} there says; its file system has no locks "
                f"({error.strerror}) that would tell. If that has ended: rm {folder / LOCK_FILE}"
            ) from None
    return None


def _lock(descriptor: int, kind: int) -> bool:
    """Takes the lock if it is free; an exclusive one stays taken."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(descriptor: int) -> Owner | None:
    """The owner that the file names; None if it is empty, or not what we write."""
    words = os.pread(descriptor, 4096, 0).decode(errors="replace").partition("\n")[0].split()
    if len(words) in (2, 3) and words[1].isascii() and words[1].isdecimal():
        return Owner(words[0], int(words[1]), *words[2:])
    return None


def _is_gone(owner: Owner) -> bool:
    """Whether it is sure that the owner has ended."""
    if owner.job is not None:
        return owner.job == this_job() or _has_ended(owner.job)
    return owner.host == socket.gethostname() and not Path(f"/proc/{owner.pid}").exists()


def _has_ended(job: str) -> bool:
    """Whether Slurm is here, answers, and knows of no such job that waits or runs."""
    command = ["squeue", "-h", "-j", job, "-o", "%T"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return not done.stdout.strip() and (not done.returncode or "Invalid job id" in done.stderr)
