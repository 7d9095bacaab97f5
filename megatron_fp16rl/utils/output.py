"""Standard output and error that never block or fail.

A reader may go away (`| head`, a lost ssh), be a full disk, or stop reading: a pipe holds 64 KiB, and then
the writer blocks. Runs that must go on without a reader print under `dropped_if_unread`; a command that
only answers ends when nobody reads (cli/__init__.py).
"""

import contextlib
import io
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

_MAX_QUEUED = 10_000  # writes; more are dropped
_DRAIN_TIMEOUT_S = 10  # at the end, for a reader that has stopped reading


class _Dropping(io.RawIOBase):
    """Queues what is written to it; a thread writes it to the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._forward, daemon=True).start()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data: Any) -> int:
        if self._waiting.qsize() < _MAX_QUEUED:
            self._waiting.put(bytes(data))
        return len(data)

    def drain(self) -> None:
        """Waits until the queue is written, but not long for a stalled reader."""
        done = threading.Event()
        self._waiting.put(done)
        done.wait(_DRAIN_TIMEOUT_S)

    def _forward(self) -> None:
        while True:
            data = self._waiting.get()
            if isinstance(data, threading.Event):
                data.set()
                continue
            try:
                self._stream.buffer.write(data)
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: it is closed
                abandon(self._stream)


@contextlib.contextmanager
def dropped_if_unread() -> Iterator[None]:
    """In the block no print fails or blocks, whatever happens to standard output and error."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    wrappers: dict[str, Any] = {}
    for name, stream in before.items():
        if stream is not None and not isinstance(getattr(stream, "buffer", None), _Dropping):
            dropping: Any = _Dropping(stream)
            wrappers[name] = io.TextIOWrapper(
                dropping, stream.encoding, "backslashreplace", line_buffering=True
            )
            setattr(sys, name, wrappers[name])
    try:
        yield
    finally:
        for name, stream in wrappers.items():
            setattr(sys, name, before[name])
            stream.flush()
            stream.buffer.drain()


def open_closed() -> None:
    """Opens standard output and error to /dev/null if this process was started with them closed.

    Python has None there, and the next file opened would get the descriptor.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def abandon(stream: TextIO) -> None:
    """Redirects a stream to /dev/null: otherwise Python's own flush at exit would fail again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
