"""Simulates how far ahead rollouts pay: the table of planner.md, and its plot.

python docs/figures/ahead.py      a minute
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools.plan.ahead import Simulated, simulate
from megatron_fp16rl.tools.plan.gpus import GPUS
from megatron_fp16rl.tools.plan.times import setup
from megatron_fp16rl.tools.recipes import find

AHEAD = 0, 1, 2, 4, 8
SERVERS, PARTS, LEADERS, PROMPTS = 32, 4, 64, 512
GPUS_IN_ALL = SERVERS * PARTS + LEADERS
SETTINGS = [
    f"rollout={{servers: {SERVERS}, tensor_parallel: {PARTS}, prompts: {PROMPTS}, ahead: 1}}",
    f"learner={{ranks: {LEADERS}, tensor_parallel: 1, sequence_parallel: false, pipeline_parallel: 1}}",
    f"learner.global_batch_size={16 * PROMPTS}",
    "algorithm={old_policy: rollout}",
    f"slurm={{learner_nodes: {LEADERS // 8}, rollout_nodes: {SERVERS * PARTS // 8}}}",
]


def main() -> None:
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for share, color in ((0.25, "#d62728"), (0.5, "#4c78a8")):
        steps = {ahead: simulated(ahead, share) for ahead in AHEAD}
        for ahead, step in steps.items():
            waits = step.learner_waits_s / step.step_s, step.servers_wait_s / step.step_s
            lost = step.dropped / (step.learnt + step.dropped)
            print(
                f"| {share:g} | {ahead} | {step.step_s:.0f} | {speed(step):.0f} | {waits[0]:.0%} | "
                f"{waits[1]:.0%} | {step.age:.1f} | {lost:.1%} |"
            )
        speeds = [speed(step) for step in steps.values()]
        axes.plot(AHEAD, speeds, "o-", color=color, label=f"mean response: {share:g} of the limit")
    axes.set(xlabel="rollout.ahead", ylabel="response tokens/s a GPU", xticks=AHEAD, ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent.parent / "images" / "ahead.png", dpi=110)


def simulated(ahead: int, share: float) -> Simulated:
    """share: of the limit that responses have on average."""
    recipe = load(find("qwen3-30b-a3b-dapo-fp16-8n8g"), SETTINGS)
    mean = share * recipe.rollout.max_new_tokens
    # On policy there is a score pass, too.
    rollout = recipe.rollout.model_copy(update={"ahead": ahead})
    sync = recipe.sync.model_copy(update={"transport": "sliced"})
    recipe = recipe.model_copy(update={"rollout": rollout, "sync": sync})
    return simulate(setup(recipe, model_config(recipe.model), GPUS["h100-80gb"], mean), steps=24)


def speed(step: Simulated) -> float:
    return step.learnt / step.step_s / GPUS_IN_ALL


if __name__ == "__main__":
    main()
