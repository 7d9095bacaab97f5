"""Processes that may hang or die: each answers one question at a time, and is killed if it is late.

Each has a pipe of its own, so that one may be killed at any moment without harm to the others
(pebble 5.2.3, multiprocessing and concurrent.futures share queues and locks among their workers: one
that dies with a lock, or while it is idle, takes all with it).
"""

import contextlib
import json
import multiprocessing
import os
import queue
import resource
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from megatron_fp16rl.processes import PARENT_VARIABLE, die_with_parent
from megatron_fp16rl.rewards import Grade, RewardError, Row

if TYPE_CHECKING:  # workers import this module, and are to be up quickly
    from megatron_fp16rl.recipe import Workers

_START_TIMEOUT_S = 300  # imports, on a busy file system
_GIB = 2**30


class Pool:
    """Grades rows in worker processes, which are started when first needed."""

    def __init__(self, settings: "Workers", prepare: Callable, *arguments: object) -> None:
        """prepare: of rewards/functions.py, called in each worker with `arguments`."""
        self.settings, self._prepare, self._arguments = settings, prepare, arguments
        # Workers are started by these threads: the kernel kills a child with the thread that made it.
        self._threads = ThreadPoolExecutor(settings.workers, "reward")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(settings.workers):
            self._idle.put(None)

    def __call__(self, rows: Sequence[Row]) -> list[Grade]:
        """Raises RewardError if no worker can be started."""
        return list(self._threads.map(self._grade, rows))

    def check(self) -> None:
        """Raises RewardError, saying why, if a worker cannot be started."""
        self._threads.submit(self._with_worker, lambda worker: None).result()

    def close(self) -> None:
        """Ends the workers."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            worker = self._idle.get()
            if worker is not None:
                worker.kill()

    def _grade(self, row: Row) -> Grade:
        return self._with_worker(lambda worker: worker.grade(row, self.settings.timeout_s))

    def _with_worker(self, use: Callable[["_Worker"], Grade | None]) -> Grade | None:
        worker = self._idle.get()
        try:
            if worker is None or not worker.is_alive:
                worker = _Worker(self.settings.memory_gib, self._prepare, self._arguments)
            return use(worker)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, ready to grade."""

    def __init__(self, memory_gib: float | None, prepare: Callable, arguments: tuple) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a rank would keep its sockets
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(os.getpid(), theirs, memory_gib, prepare, arguments),
            name="reward worker",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        answer = self._answer(_START_TIMEOUT_S)
        if answer != {"ready": True}:
            self.kill()
            reason = answer["error"] if answer else f"it ended, or took over {_START_TIMEOUT_S} s"
            raise RewardError(f"a reward worker could not be started: {reason}")

    @property
    def is_alive(self) -> bool:
        # Not by waitpid: Process.start() of another thread may just be reaping this one, and then
        # Process.is_alive() takes it for not yet born.
        return not self._pipe.closed and not wait([self._process.sentinel], timeout=0)

    def grade(self, row: Row, timeout_s: float) -> Grade:
        """A worker that does not answer in time is killed."""
        with contextlib.suppress(BrokenPipeError):  # it died; there will be no answer
            self._pipe.send_bytes(json.dumps(row).encode())
        answer = self._answer(timeout_s)
        if answer is None:
            self.kill()
            return Grade(0.0, timed_out=True)
        if "error" in answer:
            return Grade(0.0, error=answer["error"])
        return Grade(answer["reward"])

    def kill(self) -> None:
        """Ends it and what it may have started."""
        with contextlib.suppress(ProcessLookupError):  # gone, or not yet the head of its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _answer(self, timeout_s: float) -> dict[str, object] | None:
        """Its next words; None if it died or is late."""
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll(timeout_s):
                return json.loads(self._pipe.recv_bytes())
        return None


def _serve(
    parent: int, pipe: Connection, memory_gib: float | None, prepare: Callable, arguments: tuple
) -> None:
    """The life of a worker process."""
    os.setsid()  # so that it can be killed with its children
    os.environ[PARENT_VARIABLE] = str(parent)
    die_with_parent()
    if memory_gib is not None:
        limit = int(memory_gib * _GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        grade = prepare(*arguments)
    except Exception as error:
        _send(pipe, {"error": _describe(error)})
        return
    _send(pipe, {"ready": True})
    while True:
        try:
            row = Row(*json.loads(pipe.recv_bytes()))
        except EOFError:
            return
        try:
            answer = {"reward": grade(row)}
        except Exception as error:
            answer = {"error": _describe(error)}
        _send(pipe, answer)


def _send(pipe: Connection, answer: dict[str, object]) -> None:
    pipe.send_bytes(json.dumps(answer).encode())


def _describe(error: Exception) -> str:
    """The error and the line that raised it."""
    last, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        last, trace = f" ({code.co_filename}:{trace.tb_lineno})", trace.tb_next
    return f"{type(error).__name__}: {error}"[:2000] + last
