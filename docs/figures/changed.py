"""Which share of the exported numbers changes from one weight sync to the next; docs/results.md.

    fp16rl train recipes/tiny/dense-grpo-fp16.yaml --name recorded --set rollout.record=true --set trainer.steps=20
    python docs/figures/changed.py runs/recorded/rollouts [DTYPE LR]

Learns from recorded rollouts on one rank, at constant learning rates without warm-up, and compares what
would be sent with what was sent before, bit by bit.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_fp16rl.parallel import single_process_environment
from megatron_fp16rl.recipe import load
from megatron_fp16rl.rollout.recording import Replay
from megatron_fp16rl.rollout.weight_sync.base import Weights
from megatron_fp16rl.utils.processes import free_port

RECIPE, STEPS = "recipes/tiny/dense-grpo-fp16.yaml", 20
shares: list[float] = []
last: dict[str, torch.Tensor] = {}


def publish(_: Replay, weights: Weights, __: int) -> int:
    """In place of Replay.publish."""
    count = changed = 0
    for name, tensor in weights.whole():
        bits = tensor.view(torch.int16).clone()
        if name in last:
            count += bits.numel()
            changed += int((bits != last[name]).sum())
        last[name] = bits
    if count:
        shares.append(changed / count)
    return 0


def main() -> None:
    if len(sys.argv) == 2:
        for dtype in ("fp16", "bf16"):
            for rate in ("1e-6", "1e-5", "1e-4"):
                subprocess.run([sys.executable, *sys.argv, dtype, rate], check=True)
        return
    rollouts, dtype, rate = Path(sys.argv[1]).resolve(), *sys.argv[2:]
    from megatron_fp16rl.train import train

    Replay.publish = publish  # type: ignore[method-assign]
    recipe = load(
        Path(RECIPE),
        [
            *(f"precision={dtype}", f"rollout.replay={rollouts}", f"trainer.steps={STEPS}"),
            *("learner.ranks=1", "learner.tensor_parallel=1"),
            f"learner.optimizer={{lr: {rate}, beta2: 0.99}}",
        ],
    )
    single_process_environment(free_port("127.0.0.1"))
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder), Path(folder))
    median, low, high = statistics.median(shares), min(shares), max(shares)
    print(
        f"CHANGED {dtype} lr {rate}: {median:.3f} ({low:.3f} to {high:.3f}), {len(shares)} syncs",
        flush=True,
    )


if __name__ == "__main__":
    main()
