"""Worker processes that run a user's code, one question at a time, and are killed if they are late.

Each has a socket of its own, so that one can be killed at any moment without harm to the others
(pebble 5.2.3, multiprocessing and concurrent.futures share queues and locks among their workers: one
that dies holding a lock, or while it is idle, takes down all). Questions and answers are lines of JSON. Grading
code may close the socket or write to it: an answer has a maximal size and a deadline.
"""

import contextlib
import io
import json
import multiprocessing
import os
import queue
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_fp16rl.data.rewards import Grade, Grader, RewardError, Row, as_reward
from megatron_fp16rl.utils.files import parse_json
from megatron_fp16rl.utils.processes import PARENT_VARIABLE, die_with_parent

if TYPE_CHECKING:  # workers import this module, and must start quickly
    from megatron_fp16rl.recipe import Workers

_START_TIMEOUT_S = 300  # imports, on a busy file system
_MAX_ANSWER_BYTES = 2**16  # a number, or the first 2,000 characters of an error
_MAX_PRINTED = 2**16  # characters for each question
_POLL_S = 0.5  # for a worker that died while a child of it keeps its socket open

Answer = dict[str, Any]
T = TypeVar("T")


class WorkerPool(Grader):
    """Grades rows in worker processes, which are started when first needed."""

    def __init__(self, settings: "Workers", prepare: Callable, *arguments: Any) -> None:
        """prepare: a function of rewards/functions.py; each worker calls it with `arguments`."""
        self.settings, self._prepare, self._arguments = settings, prepare, arguments
        # These threads start the workers: the kernel kills a child when the thread that made it ends.
        self._threads = ThreadPoolExecutor(settings.workers, "reward")
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(settings.workers):
            self._idle.put(None)

    def __call__(self, rows: Sequence[Row]) -> list[Grade]:
        """Raises RewardError if no worker can be started."""
        timeout_s = self.settings.timeout_s

        def grade(row: Row) -> Grade:
            return self._with_worker(lambda worker: _grade(worker, row, timeout_s))

        return list(self._threads.map(grade, rows))

    def check(self) -> None:
        self._threads.submit(self._with_worker, lambda worker: None).result()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            worker = self._idle.get()
            if worker is not None:
                worker.kill()

    def _with_worker(self, use: Callable[["Worker"], T]) -> T:
        worker = self._idle.get()
        try:
            if worker is not None and not worker.is_idle:
                worker.kill()
                worker = None
            if worker is None:
                worker = Worker(
                    "reward worker", self.settings.memory_gib, self._prepare, self._arguments
                )
            return use(worker)
        finally:
            self._idle.put(worker)


def _grade(worker: "Worker", row: Row, timeout_s: float) -> Grade:
    """The grade of a row. Kills the worker if it gives no valid answer in time."""
    try:
        return Grade(as_reward(worker.ask(row, timeout_s)))
    except TimeoutError:
        return Grade(0.0, timed_out=True)
    except WorkerError as error:
        return Grade(0.0, error=str(error))
    except ValueError as error:
        worker.kill()
        return Grade(0.0, error=str(error))


class WorkerError(Exception):
    """What the code in a worker raised, or how the worker ended."""


class Worker:
    """One process, ready to be asked."""

    def __init__(
        self, name: str, memory_gib: float | None, prepare: Callable, arguments: tuple
    ) -> None:
        """name: for messages. prepare: called once in it, with `arguments`; returns what answers a question.

        Raises RewardError if it could not be started.
        """
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would inherit the rank's sockets
        self._socket, worker_end = socket.socketpair()
        self._process = context.Process(
            target=_serve,
            args=(os.getpid(), worker_end, memory_gib, prepare, arguments),
            name=name,
            daemon=True,
        )
        self._process.start()
        worker_end.close()
        try:
            reason = self._answer(time.monotonic() + _START_TIMEOUT_S).get("error")
        except WorkerError as error:
            reason = str(error)
        except TimeoutError:
            reason = f"it took over {_START_TIMEOUT_S} s"
        if reason is not None:
            self.kill()
            raise RewardError(f"a {name} could not be started: {reason}")

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a question: it lives, and has sent nothing unasked."""
        # Not by Process.is_alive(): Process.start() of another thread may be reaping this process.
        if self._socket.fileno() < 0:
            return False
        return not wait([self._process.sentinel, self._socket], timeout=0)

    def ask(self, question: Sequence[Any], timeout_s: float) -> Any:
        """What the code answers: JSON, as the question is.

        Raises WorkerError, also for what the code raised; TimeoutError. The worker is killed, unless the
        code raised.
        """
        deadline = time.monotonic() + timeout_s
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # _answer reports it
                self._socket.settimeout(timeout_s)
                self._socket.sendall(json.dumps(question).encode() + b"\n")
            answer = self._answer(deadline)
        except (TimeoutError, WorkerError):
            self.kill()
            raise
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer.get("value")

    def kill(self) -> None:
        """Ends the worker and whatever it started."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # gone, or not yet the leader of its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._socket.close()

    def _answer(self, deadline: float) -> Answer:
        """The line that the worker sends next. Raises TimeoutError and WorkerError."""
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            ready = wait([self._process.sentinel, self._socket], max(0, min(left, _POLL_S)))
            if left <= 0 and (line or not ready):
                raise TimeoutError
            part = b""
            if self._socket in ready:
                with contextlib.suppress(ConnectionResetError):
                    part = self._socket.recv(_MAX_ANSWER_BYTES)
            elif not ready and not self._has_ended():
                continue
            if not part:
                raise WorkerError(self._end())
            line += part
            if len(line) > _MAX_ANSWER_BYTES:
                raise WorkerError(f"the {self.name} gave no valid answer: it is too long")
        try:
            return parse_json(line)
        except ValueError as error:
            raise WorkerError(f"the {self.name} gave no valid answer: {error}") from None

    def _end(self) -> str:
        """How a worker ended that answers no more."""
        self._process.join(1)
        code = self._process.exitcode
        if code is None:
            return f"the {self.name} closed the socket that its answers come by"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"the {self.name} was killed by {signal.Signals(-code).name}"
        return f"the {self.name} ended with exit code {code}"

    def _has_ended(self) -> bool:
        """True also if a child that it forked keeps its socket open."""
        assert self._process.pid is not None
        try:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, flags) is not None
        except ChildProcessError:  # another thread's start() has reaped it
            return True


class _Printed(io.TextIOBase):
    """What a user's code prints: it goes to stderr, up to `left` characters for each question."""

    left = _MAX_PRINTED

    def write(self, text: str) -> int:
        """As a stream's; what is too much, or cannot be written, is dropped."""
        with contextlib.suppress(OSError, ValueError):
            os.write(2, text[: max(0, self.left)].encode(errors="replace"))
        self.left -= len(text)
        return len(text)


def _serve(
    parent: int,
    channel: socket.socket,
    memory_gib: float | None,
    prepare: Callable,
    arguments: tuple,
) -> None:
    os.setsid()  # so that it can be killed with its children
    os.environ[PARENT_VARIABLE] = str(parent)
    die_with_parent()
    os.dup2(2, 1)  # what a user's function prints goes to stderr
    printed: Any = _Printed()
    sys.stdout = sys.stderr = printed
    if memory_gib is not None:
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        answer = prepare(*arguments)
    except BaseException as error:  # SystemExit too
        channel.sendall(_describe(error))
        return
    channel.sendall(b'{"ready": true}\n')
    own = os.getpid()
    for line in channel.makefile("rb"):  # until the rank closes its end
        printed.left = _MAX_PRINTED
        try:
            reply = json.dumps({"value": answer(*json.loads(line))}).encode() + b"\n"
        except BaseException as error:
            reply = _describe(error)
        if os.getpid() != own:
            os._exit(0)  # a child that the user's function forked, and that returned as well
        channel.sendall(reply)


def _describe(error: BaseException) -> bytes:
    """An answer: an error and the line of code that raised it, as printable text."""
    last, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        last, trace = f" ({code.co_filename}:{trace.tb_lineno})", trace.tb_next
    text = f"{type(error).__name__}: {str(error)[:2000]}{last}"
    return json.dumps({"error": text.encode(errors="replace").decode()}).encode() + b"\n"
