"""Rollouts as training collects them, against the same prompts sent straight to the servers."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from launch.outcome import SERVERS
from megatron_fp16rl import platform
from megatron_fp16rl.recipe import Layout, Recipe, RecipeError

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.data.tasks import Task
    from megatron_fp16rl.parallel import World
    from megatron_fp16rl.rollout.discovery import Endpoint

Say = Callable[[str], None]
Collect = Callable[[int], int]  # a step's number -> tokens that were sampled


def measure(
    recipe: Recipe, concurrency: Sequence[int], repeats: int, work: Path, say: Say
) -> dict[str, object]:
    """Tokens a second by the number of responses that are asked for at once.

    On one rank, which asks all servers of the recipe. work: a folder for logs and weights on their
    way. Raises RecipeError, ServerDied, ServerError.
    """
    if recipe.rollout.replay is not None:
        raise RecipeError("rollout.replay: there are no servers to measure; set it to null")
    from megatron_fp16rl.parallel import initialize

    world = initialize(Layout(), recipe.trainer.seed)
    from megatron_fp16rl.data.tasks import make
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.models.tokenizer import load_tokenizer
    from megatron_fp16rl.rollout.discovery import register
    from megatron_fp16rl.rollout.server import ServerConfig, launch_servers

    like = model_folder(recipe.model)
    task = make(recipe.task, load_tokenizer(like), recipe.trainer.seed)
    rows = []
    say("servers start")
    config, count, first_device = (
        ServerConfig.of(recipe),
        recipe.rollout.servers,
        recipe.learner.ranks,
    )
    with launch_servers(config, like, work / "logs", count, first_device) as endpoints:
        for index, endpoint in enumerate(endpoints):
            register(work / SERVERS, index, endpoint)
        for count in concurrency:
            say(f"{count} at once")
            asked = _asking(recipe, count)
            ways = (
                _collected(asked, task, world, like, work),
                _raw(asked, task, endpoints),
            )
            rows.append({"concurrency": count, **row(_time(ways, repeats))})
    return {"platform": platform.current().describe(), "servers": len(endpoints), "rows": rows}


def row(measured: Sequence[tuple[float, float]]) -> dict[str, float]:
    """A row, of (tokens a second as collected, straight from the server), turn by turn."""
    ours = [collected for collected, _ in measured]
    return {
        "tokens_per_s": statistics.median(ours),
        "tokens_per_s_low": min(ours),
        "tokens_per_s_high": max(ours),
        "raw_tokens_per_s": statistics.median(raw for _, raw in measured),
        "fraction_of_raw_server": statistics.median(collected / raw for collected, raw in measured),
    }


def _time(ways: Sequence[Collect], repeats: int) -> list[tuple[float, ...]]:
    """Tokens a second by each way, turn by turn; which goes first alternates."""
    measured = []
    for step in range(1 + repeats):  # the first is for warming up
        speeds = {}
        for way in ways if step % 2 else ways[::-1]:
            began = time.perf_counter()
            tokens = way(step)
            speeds[way] = tokens / (time.perf_counter() - began)
        measured.append(tuple(speeds[way] for way in ways))
    return measured[1:]


def _asking(recipe: Recipe, count: int) -> Recipe:
    """The recipe, asking for `count` responses a step, of as many samples a prompt as it has."""
    samples = min(recipe.rollout.samples, count)
    if count % samples:
        raise RecipeError(
            f"--concurrency {count} is not a multiple of rollout.samples={samples}; set that to 1"
        )
    changes = {"prompts": count // samples, "samples": samples, "refill_rounds": 0, "record": True}
    return recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update=changes),
            # nothing is learnt here: the servers' own weights go back to them, once for each row
            "sync": recipe.sync.model_copy(update={"transport": "disk"}),
            "trainer": recipe.trainer.model_copy(update={"suites": []}),
        }
    )


def _collected(recipe: Recipe, task: "Task", world: "World", like: Path, work: Path) -> Collect:
    """As training does: through Rollouts, with grading and the record of every sample."""
    from megatron_fp16rl.models.folder import HFFolder
    from megatron_fp16rl.rollout.rollouts import Rollouts

    rollouts = Rollouts(recipe, task, world, work / SERVERS, like, work)
    weights = HFFolder(like)
    rollouts.publish(lambda: ((name, weights.read(name)) for name in weights.names()), 0)
    return lambda step: int(rollouts.collect(step)[0].mask.sum())


def _raw(recipe: Recipe, task: "Task", endpoints: "Sequence[Endpoint]") -> Collect:
    """The same prompts in one request to each server, and nothing made of the answers."""
    from megatron_fp16rl.rollout.client import Client, Sampling

    settings = recipe.rollout
    clients = [Client(endpoint, settings.request_timeout_s) for endpoint in endpoints]
    sampling = Sampling(settings.max_new_tokens, settings.temperature, stop=tuple(settings.stop))

    def ask(share: tuple[Client, list[list[int]]]) -> int:
        client, prompts = share
        body = {
            "input_ids": prompts,
            "sampling_params": sampling.parameters(),
            "return_logprob": True,
            "return_routed_experts": settings.router_replay,
        }
        answers = client.post("/generate", body)
        return sum(answer["meta_info"]["completion_tokens"] for answer in answers)

    def collect(step: int) -> int:
        prompts = task.training_prompts(step, settings.prompts)
        ids = [prompt.ids for prompt in prompts for _ in range(settings.samples)]
        shares = [(c, ids[i :: len(clients)]) for i, c in enumerate(clients)]
        with ThreadPoolExecutor(len(clients)) as threads:
            return sum(threads.map(ask, [share for share in shares if share[1]]))

    return collect
