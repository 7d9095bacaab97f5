"""Which share of the exported numbers changes from one weight sync to the next; docs/results.md.

    fp16rl train recipes/tiny/dense-grpo-fp16.yaml --name recorded --set rollout.record=true --set trainer.steps=20
    python docs/figures/changed.py runs/recorded/rollouts

Learns from recorded rollouts on one rank, at constant learning rates without warm-up.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_fp16rl.metrics import log

RECIPE, STEPS = "recipes/tiny/dense-grpo-fp16.yaml", 20


def main() -> None:
    rollouts = Path(sys.argv[1]).resolve()
    for dtype in ("fp16", "bf16"):
        for rate in ("1e-6", "1e-5", "1e-4"):
            settings = (
                *(f"precision={dtype}", f"rollout.replay={rollouts}", f"trainer.steps={STEPS}"),
                *("learner.ranks=1", "learner.tensor_parallel=1", "sync.count_changes=true"),
                f"learner.optimizer={{lr: {rate}, beta2: 0.99}}",
            )
            with tempfile.TemporaryDirectory() as root:
                options = [
                    f"--set={setting}" for setting in (*settings, f"trainer.run_root={root}")
                ]
                command = [sys.executable, "-m", "megatron_fp16rl.cli", "train", RECIPE, *options]
                subprocess.run(command, check=True, capture_output=True)
                (run,) = Path(root).iterdir()
                rows = log.read(run).rows
            shares = [s for row in rows if (s := row.get("sync/changed_fraction")) is not None]
            print(
                f"{dtype} lr {rate}: median {statistics.median(shares):.1%}, "
                f"{min(shares):.1%} to {max(shares):.1%} of {len(shares)} syncs"
            )


if __name__ == "__main__":
    main()
