"""Rollouts as training collects them: through the pool of servers, graded and recorded.

`python -m sglang.bench_serving` measures a server alone.
"""

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.outcome import SERVERS
from megatron_fp16rl import platform
from megatron_fp16rl.recipe import Layout, Recipe, RecipeError
from megatron_fp16rl.tools.bench.common import Result, Say, spread

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.rollout.rollouts import Rollouts


def measure(recipe: Recipe, concurrency: Sequence[int], repeats: int, say: Say) -> Result:
    """Tokens a second, by the number of responses in flight, on one rank and all servers.

    Raises RecipeError, ServerDied, ServerError.
    """
    settings = [_with_responses(recipe, count) for count in concurrency]
    from megatron_fp16rl.parallel import initialize

    world = initialize(Layout(), recipe.trainer.seed)
    from megatron_fp16rl.data.tasks import make
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.models.folder import HFFolder
    from megatron_fp16rl.models.tokenizer import load_tokenizer
    from megatron_fp16rl.rollout.discovery import register
    from megatron_fp16rl.rollout.rollouts import Rollouts
    from megatron_fp16rl.rollout.server import ServerConfig, launch_servers

    model = model_folder(recipe.model)
    weights = HFFolder(model)
    task = make(recipe.task, load_tokenizer(model), recipe.trainer.seed)
    config, servers = ServerConfig.of(recipe), recipe.rollout.servers
    rows = []
    say("servers start")
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoints = stack.enter_context(
            launch_servers(config, model, work / "logs", servers, recipe.learner.ranks)
        )
        for index, endpoint in enumerate(endpoints):
            register(work / SERVERS, index, endpoint)
        for count, in_flight in zip(concurrency, settings, strict=True):
            say(f"{count} at once")
            rollouts = Rollouts(in_flight, task, world, work / SERVERS, model, work)
            # Rollouts are collected only from weights that were published: the servers' own.
            rollouts.publish(lambda: ((name, weights.read(name)) for name in weights.names()), 0)
            speeds = [_tokens_per_s(rollouts, step) for step in range(1 + repeats)]
            rows.append({"concurrency": count, **spread("tokens_per_s", speeds[1:])})
    return {"platform": platform.current().describe(), "servers": servers, "rows": rows}


def _tokens_per_s(rollouts: "Rollouts", step: int) -> float:
    began = time.perf_counter()
    batch, _ = rollouts.collect(step)
    assert batch is not None  # it is on leaders, and the only rank is one
    return int(batch.mask.sum()) / (time.perf_counter() - began)


def _with_responses(recipe: Recipe, count: int) -> Recipe:
    """The recipe with `count` responses a step, of as many samples a prompt as it has."""
    samples = min(recipe.rollout.samples, count)
    if count % samples:
        raise RecipeError(
            f"--concurrency {count} is not a multiple of rollout.samples={samples}; set that to 1"
        )
    rollout = {"prompts": count // samples, "samples": samples, "refill_rounds": 0, "record": True}
    return recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update=rollout),
            "sync": recipe.sync.model_copy(update={"transport": "disk"}),
            "trainer": recipe.trainer.model_copy(update={"suites": []}),
        }
    )
