"""Standard output and error of processes that have something better to do than to wait for a reader.

Whoever reads may go away (`| head`, a lost ssh), be a full disk, or just not read on: a pipe takes
64 KiB, and whoever writes more waits. Work that goes on without its readers is done under
`dropped_if_unread`; a command that only answers ends when nobody listens (cli/__init__.py).
"""

import contextlib
import io
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

_MOST_WAITING = 10_000  # lines, or parts of them; what comes on top of these is dropped
_PATIENCE_S = 10  # at the end, for a reader that has stopped reading


class _Dropping(io.RawIOBase):
    """Takes whatever is written to it at once, and hands it on to a stream in a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._hand_on, daemon=True).start()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data: bytes) -> int:
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(bytes(data))
        return len(data)

    def drain(self) -> None:
        """Waits until all is handed on, but not long for somebody who does not take it."""
        done = threading.Event()
        self._waiting.put(done)
        done.wait(_PATIENCE_S)

    def _hand_on(self) -> None:
        while True:
            data = self._waiting.get()
            if isinstance(data, threading.Event):
                data.set()
                continue
            try:
                self._stream.buffer.write(data)
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: somebody has closed it
                abandon(self._stream)


@contextlib.contextmanager
def dropped_if_unread() -> Iterator[None]:
    """In the block no print fails or waits, whatever becomes of standard output and error."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ours = {}
    for name, stream in before.items():
        if stream is not None and not isinstance(getattr(stream, "buffer", None), _Dropping):
            ours[name] = io.TextIOWrapper(
                _Dropping(stream), stream.encoding, "backslashreplace", line_buffering=True
            )
            setattr(sys, name, ours[name])
    try:
        yield
    finally:
        for name, stream in ours.items():
            setattr(sys, name, before[name])
            stream.flush()
            stream.buffer.drain()


def open_closed() -> None:
    """Opens standard output and error to nothing where whoever started this process closed them.

    Python has None there, and the next file that is opened would get the descriptor.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def abandon(stream: TextIO) -> None:
    """Lets all that is still printed go nowhere: else Python's own flush at the end would fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
