"""Weight syncs under faults: `python -m tests.sync_faults TRANSPORT [--syncs N] [--seed K]`, prints JSON.

Two pipeline stages send weights to two real servers, one of which is killed, stopped, or has its update
closed by somebody else while a random tensor is on its way. After each sync every server that the learner
counts as updated has to serve exactly the new version. Not part of the tests: 100 syncs take ten minutes.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from megatron_fp16rl.models.build import model_folder
from tests import models
from tests.conftest import run_ranks

ROUNDING = 0.05  # log-probs of fp16 engines, at most; other weights are 1 and more apart


def main() -> None:
    """Prints what was seen; an error if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transport", choices=("sliced", "distributed"))
    parser.add_argument("--syncs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=6)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as here:
        folder = Path(here) / "model"
        folder.symlink_to(model_folder(models.recipe().model))
        settings = {"transport": chosen.transport, "syncs": chosen.syncs, "seed": chosen.seed}
        rows, _ = run_ranks(
            *(2, "faults.survive", 60 + 60 * chosen.syncs),
            **settings,
            folder=str(folder),
            timeout_s=chosen.timeout,
        )
    bad = [
        row for row in rows if not row["right"] or not row["servers"] or not row["apart"] < ROUNDING
    ]
    longest: dict[str, float] = {}
    for row in rows:
        longest[row["fault"]] = max(longest.get(row["fault"], 0), round(row["seconds"], 1))
    faults = Counter(row["fault"] for row in rows)
    servers = Counter(row["servers"] for row in rows)
    apart = max(row["apart"] for row in rows)
    print(
        json.dumps(
            settings
            | {
                "faults": faults,
                "servers": servers,
                "longest_s": longest,
                "apart": apart,
                "bad": bad,
            }
        )
    )
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
