"""The time model against step times that NeMo-RL publishes for H100 and BF16: the table of docs/planner.md.

Settings are those of its performance recipes at v0.6.0. Prompts are assumed to have 128 tokens.
"""

import re
from dataclasses import dataclass, replace

import pytest

from megatron_fp16rl.models.costs import costs
from megatron_fp16rl.models.source import shape_config
from megatron_fp16rl.tools.plan import times
from megatron_fp16rl.tools.plan.ahead import simulate
from megatron_fp16rl.tools.plan.gpus import GPUS
from megatron_fp16rl.tools.recipes import RECIPES
from tests import models
from tests.conftest import ROOT

H100, PROMPT = GPUS["h100-80gb"], 128
# On policy, learner and servers share GPUs: its state goes to the host and back, so many bytes a parameter at
# so many bytes a second of a GPU. Assumed.
SWAPPED, HOST = 16, 10e9


@dataclass(frozen=True)
class Row:
    """sizes: longest and mean sequence, prompts, samples; layout: TP (with CP), EP, PP of the learner."""

    model: str
    sizes: tuple[int, int, int, int]
    gpus: int
    tensor: int  # of a server
    layout: tuple[int, int, int]
    servers_gpus: int = 0  # of their own, one step off or more; 0: all are shared
    off: int = 0
    updates: int = 1
    recompute: bool = True
    memory: float = 0.0  # gpu_memory_utilization; 0: 0.6 on policy, else 0.8


MATH_30B, MATH_235B = (4096, 3202, 64, 32), (8192, 5710, 16, 32)
MATH_DEEPSEEK = (1536, 702, 32, 16)
QWEN3_30B, QWEN3_235B, DEEPSEEK = "qwen3-30b-a3b-base", "qwen3-235b-a22b", "deepseek-v3"
LLAMA_8B = "llama-3.1-8b-instruct"
UNSAVED = {"recompute": False, "updates": 4}
ROWS = {
    "Qwen3-30B-A3B, 32 GPUs": Row(QWEN3_30B, MATH_30B, 32, 2, (1, 8, 1), **UNSAVED),
    "Qwen3-235B-A22B, 128 GPUs": Row(QWEN3_235B, MATH_235B, 128, 16, (4, 16, 8)),
    "DeepSeek-V3, 256 GPUs": Row(DEEPSEEK, MATH_DEEPSEEK, 256, 32, (1, 16, 16)),
    "as before, PR 2779": Row(DEEPSEEK, MATH_DEEPSEEK, 256, 32, (1, 16, 16)),
    "Qwen3-235B-A22B, 256 GPUs": Row(QWEN3_235B, MATH_235B, 256, 16, (4, 16, 8)),
    "DeepSeek-V3, 512 GPUs": Row(DEEPSEEK, MATH_DEEPSEEK, 512, 32, (1, 16, 16)),
    "Llama-3.1-8B, 16 GPUs": Row(LLAMA_8B, (4096, 1019, 64, 32), 16, 1, (1, 1, 2), updates=4),
    "Qwen3-32B, 32 GPUs": Row("qwen3-32b", (4096, 3251, 64, 32), 32, 4, (4, 1, 4), **UNSAVED),
    "Qwen3-30B-A3B, 32 GPUs, 1 off": Row(
        QWEN3_30B, MATH_30B, 32, 2, (1, 8, 2), servers_gpus=16, off=1, **UNSAVED
    ),
    "Qwen3-30B-A3B, 192 GPUs, 8 off": Row(
        QWEN3_30B, MATH_30B, 192, 2, (1, 8, 1), servers_gpus=64, off=8, **UNSAVED
    ),
    "Qwen3-235B-A22B, 256 GPUs, 1 off": Row(
        QWEN3_235B, MATH_235B, 256, 8, (4, 16, 8), servers_gpus=128, off=1
    ),
    "0.88 of the memory, PR 3278": Row(
        QWEN3_235B, MATH_235B, 256, 8, (4, 16, 8), servers_gpus=128, off=1, memory=0.88
    ),
    "DeepSeek-V3, 512 GPUs, 1 off": Row(
        DEEPSEEK, MATH_DEEPSEEK, 512, 32, (1, 16, 16), servers_gpus=256, off=1
    ),
}


def predicted(row: Row) -> tuple[float, float, float, float]:
    """Seconds of a step, and of its rollout, learner and sync."""
    longest, mean, prompts, samples = row.sizes
    tensor, expert, pipeline = row.layout
    ranks = row.gpus - row.servers_gpus
    sequences, leaders = prompts * samples, ranks // (tensor * pipeline)
    # A recipe here has a prompt for every leader; its prompts are shared by the samples all the same.
    split = max(prompts, leaders)
    recipe = models.recipe(
        task={
            "kind": "dataset",
            "path": "-",
            "problem": "-",
            "answer": "-",
            "max_prompt_tokens": PROMPT,
        },
        rollout={
            "prompts": split,
            "samples": sequences // split,
            "max_new_tokens": longest - PROMPT,
            "servers": (row.servers_gpus or row.gpus) // row.tensor,
            "tensor_parallel": row.tensor,
            "sglang": {"mem_fraction_static": row.memory or (0.8 if row.off else 0.6)},
        },
        learner={
            "ranks": ranks,
            "tensor_parallel": tensor,
            "sequence_parallel": tensor > 1,
            "expert_parallel": expert,
            "pipeline_parallel": pipeline,
            "global_batch_size": sequences // row.updates,
            "micro_batch_tokens": longest,
            "megatron": {"recompute_granularity": "full"} if row.recompute else {},
        },
        algorithm={"kl": {"coefficient": 0.01}},
        precision={"dtype": "bf16"},
    )
    config = shape_config(str(RECIPES / "models" / f"{row.model}.json"))
    step = times.estimate(recipe, config, H100, mean - PROMPT)
    learn_s = step.score_s + step.update_s
    # All weights pass the network card of every GPU.
    size = costs(config).parameters
    sync_s = 2 * size / (H100.network * times.NETWORK)
    if row.off:
        # Weights arrive while responses run, of which twice a step's are under way (docs/guides/async-grpo.md).
        setup = times.setup(recipe, config, H100, mean - PROMPT)
        setup = replace(setup, leaders=1, prompts=prompts, samples=samples, sync=sync_s)
        step_s = simulate(replace(setup, ahead=max(2, row.off)), steps=6).step_s
    else:
        sync_s += 2 * size / row.gpus * SWAPPED / HOST
        step_s = step.rollout_s + learn_s + sync_s
    return step_s, step.rollout_s, learn_s, sync_s


@pytest.fixture(autouse=True)
def prompts_are_as_long_as_the_longest(monkeypatch):
    monkeypatch.setattr(times, "PROMPT_SHARE", 1.0)


def test_the_table_is_what_the_model_says():
    page = (ROOT / "docs/planner.md").read_text()
    table = dict(re.findall(r"^\| (.+?) \| (\d.+) \|$", page, re.MULTILINE))
    for name, row in ROWS.items():
        published, *cells = table[name].split(" | ")
        step_s, *parts = predicted(row)
        error = 100 * (step_s / float(published) - 1)
        assert cells == [
            f"{step_s:.0f}",
            f"{error:+.0f}%",
            "+".join(f"{s:.0f}" for s in parts),
        ], name
