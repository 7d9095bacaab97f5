"""Why learner ranks failed: from the faults that they wrote and from their exit codes.

logs/attempt_K/fault_N.json   why rank N ended
logs/attempt_K/cause.json     which rank began

Standard library and Python 3.9 only: see launch/supervisor.py.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fp16rl.utils.files import Unreadable, read_json, write_json
from megatron_fp16rl.utils.processes import tail

CAUSE_FILE = "cause.json"
ERROR, HANG, KILLED = "error", "hang", "killed"
# What gloo, NCCL and torch's store say of a lost peer.
_LOST_PEER = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote (process|error)|[Tt]imed out|[Aa]borted"
)


def write_fault(logs: Path, rank: int, kind: str, reason: str, where: str = "") -> None:
    """Keeps why a rank ends. Its first fault stays: later ones follow from it.

    kind: ERROR or HANG; where: the line of our code that the rank stood at.
    """
    file = logs / f"fault_{rank}.json"
    if not file.exists():
        fault = {"rank": rank, "kind": kind, "reason": reason, "where": where, "time": time.time()}
        write_json(file, fault)


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended. kind: ERROR, HANG or KILLED; cause: a sentence; log: of the rank to blame."""

    rank: int
    kind: str
    cause: str
    log: str

    def write(self, logs: Path) -> None:
        """Keeps it in cause.json. A full disk must not hide it."""
        with contextlib.suppress(OSError):
            write_json(logs / CAUSE_FILE, asdict(self))

    @property
    def excerpt(self) -> str:
        """The end of the log."""
        return f"Last lines of {self.log}:\n{tail(Path(self.log))}"


def find(logs: Path, codes: Sequence[int | None]) -> Cause:
    """codes: by rank as subprocess gives them, None of a rank that had not ended, or is unknown.

    A dead rank breaks the connections of its peers, which then fail too. So a signal counts first, then a
    hang, then a rank that wrote nothing, then the earliest fault. A fault that names a lost peer counts
    last, because the clocks of nodes differ.
    """
    faults = _faults(logs)
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    hung = [rank for rank in sorted(faults) if faults[rank]["kind"] == HANG]
    silent = [rank for rank in range(len(codes)) if rank not in faults]
    if killed:
        kind, rank = KILLED, killed[0]
        name = signal.Signals(-(codes[rank] or 0)).name
        text = f"learner rank {rank} was killed by {name}"
        if name == "SIGKILL":
            text += " (if nobody sent it, the machine ran out of memory)"
    elif hung:
        kind, rank = HANG, hung[0]
        stood = [f"rank {r} stood at {faults[r]['where']}" for r in hung]
        stood += [f"rank {r} did not answer" for r in silent]
        text = f"the learner hung: {faults[rank]['reason']}; {'; '.join(stood)}"
    elif faults and not (silent and all(code is None for code in codes)):
        kind, rank = ERROR, min(faults, key=lambda r: _order(faults[r]))
        text = f"learner rank {rank} ended with {faults[rank]['reason']}"
    else:
        kind, rank = KILLED, next((r for r in silent if codes[r]), silent[0] if silent else 0)
        how = f"with code {codes[rank]}" if codes[rank] else "killed, or its node lost"
        text = f"learner rank {rank} ended without a word: {how}"
    return Cause(rank, kind, text, str(rank_log(logs, rank)))


def rank_log(logs: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return logs / f"rank_{rank}.log"


def _faults(logs: Path) -> dict[int, dict[str, Any]]:
    """By rank. An unreadable one is left out: it must not end the supervisor."""
    faults = {}
    for file in logs.glob("fault_*.json"):
        with contextlib.suppress(Unreadable, KeyError, TypeError, ValueError):
            fault = read_json(file)
            texts = {name: str(fault[name]) for name in ("kind", "reason", "where")}
            faults[int(fault["rank"])] = {**texts, "time": float(fault["time"])}
    return faults


def _order(fault: dict[str, Any]) -> tuple[bool, float]:
    return _LOST_PEER.search(fault["reason"]) is not None, fault["time"]
