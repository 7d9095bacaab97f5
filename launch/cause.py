"""Why learner ranks ended before their time: what they said, and what their launcher saw.

logs/attempt_K/fault_N.json   what rank N had to say before it ended
logs/attempt_K/cause.json     what became of all ranks, and which began

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
# What gloo, NCCL and torch's store say of a rank that is gone.
_FOLLOWS = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote (process|error)|[Tt]imed out|[Aa]borted"
)
_HINTS = {"SIGKILL": " (if nobody sent it, the machine ran out of memory)"}


def write_fault(logs: Path, rank: int, kind: str, reason: str, where: str = "") -> None:
    """Keeps what ends a rank. Its first fault stays: later ones follow from it.

    kind: ERROR or HANG; where: the line of ours that the rank stood at.
    """
    file = logs / f"fault_{rank}.json"
    if not file.exists():
        fault = {"rank": rank, "kind": kind, "reason": reason, "where": where, "time": time.time()}
        write_json(file, fault)


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended.

    rank         that is to blame
    kind         ERROR, HANG or KILLED
    cause        the same in a sentence
    ranks        by rank: exit code, signal, and where a rank stood that hung, as far as known
    log          of the rank, and its last lines
    """

    rank: int
    kind: str
    cause: str
    ranks: list[dict[str, object]]
    log: str
    last_lines: str

    @classmethod
    def find(cls, logs: Path, codes: Sequence[int | None]) -> Cause:
        """codes: by rank as subprocess gives them, None of a rank that had not ended, or is unknown.

        When one rank ends, the others lose their connection to it and end as well. So a signal is
        first, then a hang, then a rank that said nothing, then the earliest fault; but what says that
        another rank is gone comes last, for the clocks of nodes differ, and jump.
        """
        faults = _faults(logs)
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        hung = [rank for rank in sorted(faults) if faults[rank]["kind"] == HANG]
        silent = [rank for rank in range(len(codes)) if rank not in faults]
        if killed:
            rank, kind, name = killed[0], KILLED, _signal(codes[killed[0]])
            said = f"learner rank {rank} was killed by {name}{_HINTS.get(name, '')}"
        elif hung:
            rank, kind = hung[0], HANG
            stood = [f"rank {r} stood at {faults[r]['where']}" for r in hung]
            stood += [f"rank {r} did not answer" for r in silent]
            said = f"the learner hung: {faults[rank]['reason']}; {'; '.join(stood)}"
        elif faults and not (silent and all(code is None for code in codes)):
            rank, kind = min(faults, key=lambda r: _when(faults[r])), ERROR
            said = f"learner rank {rank} ended with {faults[rank]['reason']}"
        else:
            rank, kind = next((r for r in silent if codes[r]), silent[0] if silent else 0), KILLED
            how = f"with code {codes[rank]}" if codes[rank] else "killed, or its node lost"
            said = f"learner rank {rank} ended without a word: {how}"
        log = rank_log(logs, rank)
        return cls(rank, kind, said, _ranks(codes, faults), str(log), tail(log))

    def write(self, logs: Path) -> None:
        """Keeps it in cause.json. A full disk must not hide it."""
        with contextlib.suppress(OSError):
            write_json(logs / CAUSE_FILE, asdict(self))

    @property
    def excerpt(self) -> str:
        """The end of the log."""
        return f"Last lines of {self.log}:\n{self.last_lines}"


def rank_log(logs: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return logs / f"rank_{rank}.log"


def _ranks(codes: Sequence[int | None], faults: dict[int, dict]) -> list[dict[str, object]]:
    return [
        {
            "rank": rank,
            "code": code if code is None or code >= 0 else None,
            "signal": _signal(code) if code is not None and code < 0 else None,
            "where": faults.get(rank, {}).get("where") or None,
        }
        for rank, code in enumerate(codes)
    ]


def _signal(code: int) -> str:
    return signal.Signals(-code).name


def _faults(logs: Path) -> dict[int, dict[str, Any]]:
    """By rank. One that cannot be read is none: why the ranks ended must not end their launcher."""
    faults = {}
    for file in logs.glob("fault_*.json"):
        with contextlib.suppress(Unreadable, KeyError, TypeError, ValueError):
            fault = read_json(file)
            faults[int(fault["rank"])] = {
                **{name: str(fault[name]) for name in ("kind", "reason", "where")},
                "time": float(fault["time"]),
            }
    return faults


def _when(fault: dict[str, Any]) -> tuple[bool, float]:
    """What to sort faults by, to have first what began."""
    return _FOLLOWS.search(fault["reason"]) is not None, fault["time"]
