"""A learner that hangs says where, and ends.

A rank that waits for another in a collective looks like one that works. So when one gives up, all show
where they are.
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

EXIT_CODE = 86  # of a rank that its watchdog ended
_PROJECT = Path(__file__).parents[2]
_OURS = tuple(str(_PROJECT / name) + "/" for name in ("megatron_fp16rl", "launch"))
_LOOK_EVERY_S = 1.0
# The first rank that leaves takes the others' connections with it: they are to show their stacks before.
_GRACE_S = 3.0
_LONGEST_S = 366 * 86400.0  # that a thread is made to wait; clocks overflow somewhere beyond


class Watchdog:
    """A thread that ends this process when the main thread has not called `beat` for too long.

    Then the Python stacks of all threads are on stderr, of all ranks.
    """

    def __init__(
        self, patience_s: float | None, flag: Path, report: Callable[[str, str], None]
    ) -> None:
        """patience_s: with one thing; None, and more than a year, are without end. flag: a file by which ranks tell each other.

        report: is told what took too long, and the line of ours that the main thread stands at.
        """
        if patience_s is not None and patience_s > _LONGEST_S:
            patience_s = None
        self.patience_s, self.flag, self.report = patience_s, flag, report
        self._now = ("", math.inf, math.inf)  # what is done, how long it may take, and until when
        if patience_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @classmethod
    def idle(cls) -> "Watchdog":
        """One that lets everything take as long as it likes."""
        return cls(None, Path(), lambda reason, where: None)

    def beat(self, what: str, more_s: float = 0.0) -> None:
        """`what` comes next; it may take `more_s` above the usual."""
        if self.patience_s is None:
            return
        limit = self.patience_s + more_s
        self._expect(what, limit, time.monotonic() + limit)

    @contextlib.contextmanager
    def waiting(self, most_s: float) -> Iterator[None]:
        """The block waits for another program, for `most_s` at the most: that time does not count.

        To be entered by all ranks, as those wait that have to do with the other program through one
        of them.
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
        # Should something hold Python's lock for ever, our thread cannot run; this one does without.
        left = max(0.0, until - time.monotonic())
        faulthandler.dump_traceback_later(left + 10 * _GRACE_S, exit=True)

    def close(self) -> None:
        """From now on everything may take as long as it likes."""
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
    """Where the main thread is: its innermost line of ours, and the line of train.py that led there."""
    frame = sys._current_frames()[threading.main_thread().ident]
    ours = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OURS):
            file = Path(frame.f_code.co_filename).relative_to(_PROJECT)
            ours.append(f"{file}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    outer = [place for place in ours[1:] if place.startswith("megatron_fp16rl/train.py")]
    return ", called in ".join([*ours[:1], *outer[:1]]) or "no line of ours"
