"""Rollouts as training collects them, against the same prompts sent straight to the servers."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from launch.outcome import SERVERS
from megatron_fp16rl import platform
from megatron_fp16rl.recipe import Layout, Recipe, RecipeError
from megatron_fp16rl.tools.bench.common import Result, Say, View, require_servers, spread

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.data.tasks import Task
    from megatron_fp16rl.parallel import World
    from megatron_fp16rl.rollout.discovery import Endpoint

VIEW = View(
    "{servers} server(s), {platform}",
    {
        "at once": "{concurrency}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "spread": "{tokens_per_s_low:,.0f} to {tokens_per_s_high:,.0f}",
        "raw server": "{raw_tokens_per_s:,.0f}",
        "of raw server": "{fraction_of_raw_server:.2f}",
    },
)
Collect = Callable[[int], int]  # a step's number -> tokens that were sampled


def measure(recipe: Recipe, concurrency: Sequence[int], repeats: int, say: Say) -> Result:
    """Tokens a second, by the number of responses in flight, on one rank and all servers.

    Raises RecipeError, ServerDied, ServerError.
    """
    require_servers(recipe)
    from megatron_fp16rl.parallel import initialize

    world = initialize(Layout(), recipe.trainer.seed)
    from megatron_fp16rl.data.tasks import make
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.models.tokenizer import load_tokenizer
    from megatron_fp16rl.rollout.discovery import register
    from megatron_fp16rl.rollout.server import ServerConfig, launch_servers

    model = model_folder(recipe.model)
    task = make(recipe.task, load_tokenizer(model), recipe.trainer.seed)
    rows = []
    say("servers start")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with launch_servers(
            ServerConfig.of(recipe),
            model,
            work / "logs",
            recipe.rollout.servers,
            first_device=recipe.learner.ranks,
        ) as endpoints:
            for index, endpoint in enumerate(endpoints):
                register(work / SERVERS, index, endpoint)
            for count in concurrency:
                say(f"{count} at once")
                settings = _with_responses(recipe, count)
                ways = (
                    _collected(settings, task, world, model, work),
                    _raw(settings, task, endpoints),
                )
                rows.append({"concurrency": count, **row(_time(ways, repeats))})
    return {"platform": platform.current().describe(), "servers": len(endpoints), "rows": rows}


def row(speeds: Sequence[tuple[float, ...]]) -> dict[str, float]:
    """One row, from pairs of tokens a second: as collected, and raw in the same turn."""
    return {
        **spread("tokens_per_s", [collected for collected, _ in speeds]),
        "raw_tokens_per_s": statistics.median(raw for _, raw in speeds),
        "fraction_of_raw_server": statistics.median(collected / raw for collected, raw in speeds),
    }


def _time(ways: Sequence[Collect], repeats: int) -> list[tuple[float, ...]]:
    """Tokens a second each way, turn by turn; the way that goes first alternates."""
    measured = []
    for step in range(1 + repeats):  # the first warms up
        speeds = {}
        for way in ways if step % 2 else ways[::-1]:
            began = time.perf_counter()
            tokens = way(step)
            speeds[way] = tokens / (time.perf_counter() - began)
        measured.append(tuple(speeds[way] for way in ways))
    return measured[1:]


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
            # Nothing is learnt: the servers' own weights are published once per row.
            "sync": recipe.sync.model_copy(update={"transport": "disk"}),
            "trainer": recipe.trainer.model_copy(update={"suites": []}),
        }
    )


def _collected(recipe: Recipe, task: "Task", world: "World", model: Path, work: Path) -> Collect:
    """As training does: through Rollouts, with grading and the record of every sample."""
    from megatron_fp16rl.models.folder import HFFolder
    from megatron_fp16rl.rollout.rollouts import Rollouts

    rollouts = Rollouts(recipe, task, world, work / SERVERS, model, work)
    weights = HFFolder(model)
    rollouts.publish(lambda: ((name, weights.read(name)) for name in weights.names()), 0)

    def collect(step: int) -> int:
        batch, _ = rollouts.collect(step)
        return int(batch.mask.sum())

    return collect


def _raw(recipe: Recipe, task: "Task", endpoints: "Sequence[Endpoint]") -> Collect:
    """The same prompts in one request per server; the answers are only counted."""
    from megatron_fp16rl.rollout.client import Client, Sampling

    settings = recipe.rollout
    clients = [Client(endpoint, settings.request_timeout_s) for endpoint in endpoints]
    sampling = Sampling(settings.max_new_tokens, settings.temperature, stop=tuple(settings.stop))

    def request(share: tuple[Client, list[list[int]]]) -> int:
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
            return sum(threads.map(request, [share for share in shares if share[1]]))

    return collect
