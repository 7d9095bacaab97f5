"""A learner that hangs reports where, and ends.

A rank that waits in a collective looks like one that works. So when one gives up, all ranks dump their
stacks.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

EXIT_CODE = 86  # of a rank that its watchdog ended
_PROJECT = Path(__file__).parents[2]
_OURS = tuple(str(_PROJECT / name) + "/" for name in ("megatron_fp16rl", "launch"))
_LOOK_EVERY_S = 1.0
# The first rank that exits breaks the connections of the others: they must dump their stacks before.
_GRACE_S = 3.0
_MAX_TIMEOUT_S = 366 * 86400.0  # clocks overflow somewhere beyond


class Watchdog:
    """Ends this process when the main thread has not called `beat` for too long.

    Before that, all ranks write the Python stacks of all threads to stderr.
    """

    def __init__(
        self, patience_s: float | None, flag: Path, report: Callable[[str, str], None]
    ) -> None:
        """patience_s: timeout of a phase; None, or more than a year: no timeout. flag: a file that tells all
        ranks that one has timed out. report: called with the reason and the main thread's line.
        """
        if patience_s is not None and patience_s > _MAX_TIMEOUT_S:
            patience_s = None
        self.patience_s, self.flag, self.report = patience_s, flag, report
        self._now = ("", math.inf, math.inf)  # the phase, its timeout and its deadline
        if patience_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @classmethod
    def idle(cls) -> "Watchdog":
        return cls(None, Path(), lambda reason, where: None)

    def beat(self, what: str, more_s: float = 0.0) -> None:
        """Starts the deadline for phase `what`: the timeout plus `more_s`."""
        if self.patience_s is None:
            return
        limit = self.patience_s + more_s
        self._expect(what, limit, time.monotonic() + limit)

    @contextlib.contextmanager
    def waiting(self, most_s: float) -> Iterator[None]:
        """Pauses the deadline while the block waits for another program, for at most `most_s`.

        All ranks must enter it, also those that wait for the program through another rank.
        """
        what, limit, until = self._now
        if until == math.inf:
            yield
            return
        self._expect(what, limit + most_s, until + most_s)
        began = time.monotonic()
        yield
        waited = time.monotonic() - began
        self._expect(what, limit + waited, until + waited)

    def _expect(self, what: str, limit: float, until: float) -> None:
        self._now = (what, limit, until)
        # Fallback in C: works even if the GIL is never released.
        left = max(0.0, until - time.monotonic())
        faulthandler.dump_traceback_later(left + 10 * _GRACE_S, exit=True)

    def close(self) -> None:
        self._now = ("", math.inf, math.inf)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        late = False
        while not late and not self.flag.exists():
            time.sleep(_LOOK_EVERY_S)
            late = time.monotonic() > self._now[2]
        try:
            self._show(late)
            time.sleep(_GRACE_S)
        finally:
            os._exit(EXIT_CODE)

    def _show(self, late: bool) -> None:
        what, limit, _ = self._now
        why = f"took more than {limit:.0f} s (trainer.step_timeout_s)"
        reason = f"{what} {why if late else 'was broken off: another rank hangs'}"
        where = _place()
        print(f"hung: {reason}; at {where}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        self.flag.touch()
        self.report(reason, where)


def _place() -> str:
    """Where the main thread is: the innermost line of this project, and the line of train.py above it."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident or 0]
    lines = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OURS):
            file = Path(frame.f_code.co_filename).relative_to(_PROJECT)
            lines.append(f"{file}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    outer = [place for place in lines[1:] if place.startswith("megatron_fp16rl/train.py")]
    return ", called in ".join([*lines[:1], *outer[:1]]) or "no line of ours"
