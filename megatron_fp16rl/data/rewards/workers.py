"""Worker processes that grade one response at a time, and are killed if they are late.

Each has a socket of its own, so that one can be killed at any moment without harm to the others
(pebble 5.2.3, multiprocessing and concurrent.futures share queues and locks among their workers: one
that dies holding a lock, or while it is idle, takes down all). Grading code may also close the socket or
write to it: an answer has a number, a maximal size and a deadline.
"""

import contextlib
import json
import multiprocessing
import os
import queue
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_fp16rl.data.rewards import Grade, Grader, RewardError, Row, as_reward
from megatron_fp16rl.utils.processes import PARENT_VARIABLE, die_with_parent

if TYPE_CHECKING:  # workers import this module, and must start quickly
    from megatron_fp16rl.recipe import Workers

_START_TIMEOUT_S = 300  # imports, on a busy file system
_MAX_ANSWER_BYTES = 2**16  # a number, or the first 2,000 characters of an error
_POLL_S = 0.5  # for a worker that died while a child of it keeps its pipes open
_GIB = 2**30

Answer = dict[str, Any]
T = TypeVar("T")


class WorkerPool(Grader):
    """Grades rows in worker processes, which are started when first needed."""

    def __init__(self, settings: "Workers", prepare: Callable, *arguments: Any) -> None:
        """prepare: a function of rewards/functions.py; each worker calls it with `arguments`."""
        self.settings, self._prepare, self._arguments = settings, prepare, arguments
        # These threads start the workers: the kernel kills a child when the thread that made it ends.
        self._threads = ThreadPoolExecutor(settings.workers, "reward")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(settings.workers):
            self._idle.put(None)

    def __call__(self, rows: Sequence[Row]) -> list[Grade]:
        """Raises RewardError if no worker can be started."""
        return list(self._threads.map(self._grade, rows))

    def check(self) -> None:
        """Raises RewardError if a worker cannot be started."""
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

    def _with_worker(self, use: Callable[["_Worker"], T]) -> T:
        worker = self._idle.get()
        try:
            if worker is None or not worker.is_alive:
                worker = _Worker(self.settings.memory_gib, self._prepare, self._arguments)
            return use(worker)
        finally:
            self._idle.put(worker)


class _Late(Exception):
    """A worker has not answered in time."""


class _Broken(Exception):
    """A worker has died or gave no valid answer. The message says which."""


class _Worker:
    """One process, ready to grade."""

    def __init__(self, memory_gib: float | None, prepare: Callable, arguments: tuple) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the rank's sockets
        self._socket, theirs = socket.socketpair()
        self._read, self._number = b"", 0
        self._process = context.Process(
            target=_serve,
            args=(os.getpid(), theirs, memory_gib, prepare, arguments),
            name="reward worker",
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid
        theirs.close()
        reason = f"it took over {_START_TIMEOUT_S} s"
        with contextlib.suppress(_Late):
            try:
                answer = self._answer(time.monotonic() + _START_TIMEOUT_S)
                if answer == {"ready": True}:
                    return
                reason = _error_in(answer)
            except _Broken as error:
                reason = str(error)
        self.kill()
        raise RewardError(f"a reward worker could not be started: {reason}")

    @property
    def is_alive(self) -> bool:
        """Whether it waits for a row. A worker that sends unasked is of no more use."""
        # Not by waitpid: Process.start() of another thread may be reaping this process, and then
        # Process.is_alive() reports it as not started.
        if self._socket.fileno() < 0 or self._read:
            return False
        return not wait([self._process.sentinel, self._socket], timeout=0)

    def grade(self, row: Row, timeout_s: float) -> Grade:
        """The grade of a row. Kills the worker if it gives no valid answer in time."""
        deadline = time.monotonic() + timeout_s
        self._number += 1
        request = json.dumps([self._number, row]).encode() + b"\n"
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # _answer reports it
                self._socket.settimeout(timeout_s)
                self._socket.sendall(request)
            answer = self._answer(deadline)
            if answer.pop("number", None) != self._number or self._read:
                raise _Broken("the reward worker answered what it was not asked")
            if "reward" not in answer:
                return Grade(0.0, error=_error_in(answer))
            return Grade(as_reward(answer["reward"]))
        except (_Late, TimeoutError):
            self.kill()
            return Grade(0.0, timed_out=True)
        except (_Broken, ValueError) as error:
            self.kill()
            return Grade(0.0, error=str(error))

    def kill(self) -> None:
        """Ends the worker and whatever it started."""
        with contextlib.suppress(ProcessLookupError):  # gone, or not yet the leader of its group
            os.killpg(self._pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._socket.close()

    def _answer(self, deadline: float) -> Answer:
        """The next line from the worker. Raises _Late and _Broken."""
        while b"\n" not in self._read:
            if len(self._read) > _MAX_ANSWER_BYTES:
                raise _Broken(
                    f"the reward worker said over {_MAX_ANSWER_BYTES} bytes in place of a number"
                )
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Late
            ready = wait([self._process.sentinel, self._socket], min(left, _POLL_S))
            if self._socket in ready:
                with contextlib.suppress(ConnectionResetError):
                    if more := self._socket.recv(2**16):
                        self._read += more
                        continue
                raise _Broken(self._exit_reason())
            if ready or self._has_ended():
                raise _Broken(self._exit_reason())
        line, _, self._read = self._read.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise _Broken(
                "something in the reward worker wrote to the socket that its answers come by: "
                f"{line[:100]!r}"
            )
        return answer

    def _has_ended(self) -> bool:
        """True also if a child that it forked keeps its pipes open."""
        try:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._pid, flags) is not None
        except ChildProcessError:  # another thread's start() has reaped it
            return True

    def _exit_reason(self) -> str:
        """How a worker ended."""
        self._process.join(1)
        code = self._process.exitcode
        if code is None:
            return "the reward worker closed the socket that its answers come by"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"the reward worker was killed by {signal.Signals(-code).name}"
        return f"the reward worker ended with exit code {code}"


def _error_in(answer: Answer) -> str:
    """The error in an answer, as printable text."""
    return str(answer.get("error", answer))[:3000].encode(errors="replace").decode()


def _serve(
    parent: int,
    channel: socket.socket,
    memory_gib: float | None,
    prepare: Callable,
    arguments: tuple,
) -> None:
    """Main function of a worker process."""
    os.setsid()  # so that it can be killed with its children
    os.environ[PARENT_VARIABLE] = str(parent)
    die_with_parent()
    os.dup2(2, 1)  # what a user's function prints goes to stderr
    if memory_gib is not None:
        limit = int(memory_gib * _GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        grade = prepare(*arguments)
    except BaseException as error:  # SystemExit too
        _send(channel, {"error": _describe(error)})
        return
    _send(channel, {"ready": True})
    own = os.getpid()
    for line in channel.makefile("rb"):
        number, row = json.loads(line)
        try:
            answer = {"reward": grade(Row(*row))}
        except BaseException as error:
            answer = {"error": _describe(error)}
        if os.getpid() != own:
            os._exit(0)  # a child that the grading function forked, and that returned as well
        _send(channel, {"number": number, **answer})


def _send(channel: socket.socket, answer: Answer) -> None:
    channel.sendall(json.dumps(answer).encode() + b"\n")


def _describe(error: BaseException) -> str:
    """An error and the line that raised it."""
    last, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        last, trace = f" ({code.co_filename}:{trace.tb_lineno})", trace.tb_next
    try:
        message = str(error)[:2000]
    except BaseException:  # a foreign __str__
        message = "its message cannot be had"
    return f"{type(error).__name__}: {message}{last}"
