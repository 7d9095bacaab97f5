"""One daemon thread that samples while the learner learns."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """Work that runs in a Background's thread; `result` is collected once, by another thread."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work, self._done = work, threading.Event()
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.seconds = 0.0  # that the work took, once it is done

    def run(self) -> None:
        began = time.monotonic()
        try:
            self._results.append(self._work())
        except BaseException as error:  # raised again in `result`, where every rank hears of it
            self._error = error
        self.seconds = time.monotonic() - began
        self._done.set()

    def result(self) -> T:
        """Waits; returns what the work returned, or raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._results.pop()


class Background:
    """Runs one job after the other in a thread that lives as long as this process.

    One thread for all jobs: the kernel kills children (reward workers) with the *thread* that started
    them. A daemon: a process that fails does not wait for open requests.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], T]) -> Job[T]:
        """Begins `work` now, or after the jobs before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
            self._thread.start()
        job = Job(work)
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        while True:
            self._jobs.get().run()
