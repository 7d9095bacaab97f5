"""Hangs: a rank whose step takes too long shows where every rank stands, and ends.

A rank that waits for another in a collective looks like one that works. So when one gives up, all
print their stacks.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

EXIT_CODE = 86  # of a rank that ended because its step took too long
_LOOK_EVERY_S, _LET_OTHERS_PRINT_S = 0.5, 3
_OURS = ("/megatron_fp16rl/", "/launch/")


class Watchdog:
    """A thread that ends this process if `beat` is not called for `patience_s` seconds.

    folder: where ranks leave word that they hang, and where they stand; shared by all, empty at first.
    """

    def __init__(self, folder: Path, rank: int, patience_s: float) -> None:
        self.folder, self.rank, self.patience_s = folder, rank, patience_s
        self.at = "the start"
        self._last = time.monotonic()
        self._watched = threading.current_thread().ident
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, at: str) -> None:
        """Something was done; what comes next is `at`."""
        self._last, self.at = time.monotonic(), at

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY_S)
            late = time.monotonic() - self._last > self.patience_s
            if late or (self.folder.exists() and any(self.folder.iterdir())):
                self._end(late)

    def _end(self, late: bool) -> None:
        where = self._where()
        why = (
            f"took more than trainer.step_timeout_s={self.patience_s:g} s"
            if late
            else "was broken off because another rank hangs"
        )
        print(f"rank {self.rank}: {self.at} {why}; it stands at {where}", file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / str(self.rank)).write_text(f"{self.at}: {where}")
        time.sleep(_LET_OTHERS_PRINT_S)
        os._exit(EXIT_CODE)

    def _where(self) -> str:
        """The innermost line of this repository that the watched thread is in."""
        frame = sys._current_frames().get(self._watched)
        while frame is not None:
            file = frame.f_code.co_filename
            if any(part in file for part in _OURS):
                short = file[max(file.rfind(part) for part in _OURS) + 1 :]
                return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "code of others"
