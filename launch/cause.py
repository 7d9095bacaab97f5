"""Why learner ranks died: `python -m launch.cause RUN_DIR LOGS` leaves it in LOGS/cause.json.

The local launcher knows exit codes; a batch script knows srun's only, and leaves the rest to the logs.
"""

import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import outcome
from launch.rank import HUNG
from megatron_fp16rl import watchdog
from megatron_fp16rl.files import write_json
from megatron_fp16rl.processes import tail

CAUSE_FILE = "cause.json"


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended: the rank that is to blame, what became of it, its last log lines."""

    rank: int
    cause: str
    log: str
    last_lines: str

    @classmethod
    def of(cls, codes: list[int | None], logs: Path, hung: Path) -> "Cause":
        """codes: exit codes of all ranks, None of those that still run."""
        killed = [r for r, code in enumerate(codes) if code is not None and code < 0]
        ended = [r for r, code in enumerate(codes) if code]
        if any(code == watchdog.EXIT_CODE for code in codes):
            places = {int(file.name): file.read_text() for file in sorted(hung.glob("*"))}
            silent = [r for r in range(len(codes)) if r not in places and codes[r] is None]
            said = [f"rank {r} at {place}" for r, place in sorted(places.items())]
            said += [f"rank {r} says nothing" for r in silent]
            rank, what = (silent or ended)[0], f"hung: {'; '.join(said)}"
        elif killed:
            rank = killed[0]
            what = f"killed by {signal.Signals(-codes[rank]).name}"
        else:
            rank = next((r for r in ended if "Error" in tail(rank_log(logs, r), 400)), ended[0])
            what = f"ended with code {codes[rank]}"
        log = rank_log(logs, rank)
        return cls(rank, what, str(log), tail(log))

    def __str__(self) -> str:
        return (
            f"learner rank {self.rank} {self.cause}. Last lines of {self.log}:\n{self.last_lines}"
        )

    def as_dict(self) -> dict[str, object]:
        """For cause.json."""
        return asdict(self)


def rank_log(logs: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return logs / f"rank_{rank}.log"


def main() -> None:
    """For a batch script, after its ranks have ended."""
    folder, logs = Path(sys.argv[1]), Path(sys.argv[2])
    count = len(list(logs.glob("rank_*.log")))
    hung = any((folder / HUNG).glob("*"))
    found = Cause.of([watchdog.EXIT_CODE if hung else 1] * count, logs, folder / HUNG)
    ended = outcome.read(folder)
    write_json(
        logs / CAUSE_FILE, {**found.as_dict(), "cause": ended.reason if ended else found.cause}
    )
    print(found, file=sys.stderr)


if __name__ == "__main__":
    main()
