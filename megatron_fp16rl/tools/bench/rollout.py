"""Rollouts as training collects them, against the same prompts sent straight to the servers."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.outcome import SERVERS
from megatron_fp16rl import platform
from megatron_fp16rl.data.tasks import Task, make
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.parallel import initialize
from megatron_fp16rl.recipe import EnvironmentTask, Layout, Recipe, RecipeError
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.discovery import register
from megatron_fp16rl.rollout.rollouts import Rollouts
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.rollout.weight_sync.base import WholeWeights
from megatron_fp16rl.tools.bench.common import Result, Say, spread

Collect = Callable[[int], int]  # a step's number -> tokens that were sampled


def measure(recipe: Recipe, concurrency: Sequence[int], repeats: int, say: Say) -> Result:
    """Tokens a second, by the number of responses in flight, on one rank and all servers.

    Raises RecipeError, ServerDied, ServerError.
    """
    if isinstance(recipe.task, EnvironmentTask) or recipe.rollout.function is not None:
        raise RecipeError(
            f"task.kind={recipe.task.kind}, rollout.function={recipe.rollout.function}: the plain request to "
            "compare with has one turn; bench a recipe of the same model with task.kind: dataset"
        )
    settings = [_with_responses(recipe, count) for count in concurrency]
    world = initialize(Layout(), recipe.trainer.seed)
    model = model_folder(recipe.model)
    weights = HFFolder(model)
    shapes = {name: tuple(weights.read(name).shape) for name in weights.names()}
    task = make(recipe.task, load_tokenizer(model), recipe.trainer.seed)
    config, servers = ServerConfig.of(recipe), recipe.rollout.servers
    rows = []
    say("servers start")
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = stack.enter_context(
            launch_servers(config, model, work / "logs", servers, recipe.learner.ranks)
        )
        for index, server in enumerate(running):
            register(work / SERVERS, index, server.endpoint)
        clients = [Client(server.endpoint, recipe.rollout.request_timeout_s) for server in running]
        for count, in_flight in zip(concurrency, settings, strict=True):
            say(f"{count} at once")
            rollouts = Rollouts(in_flight, task, world, work / SERVERS, model, work)
            # Rollouts are collected only from weights that were published: the servers' own.
            rollouts.publish(WholeWeights(shapes, weights.read), 0)
            ways = (_collected(rollouts), _raw(in_flight, task, clients))
            rows.append({"concurrency": count, **row(_time(ways, repeats))})
    return {"platform": platform.current().describe(), "servers": servers, "rows": rows}


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


def _collected(rollouts: Rollouts) -> Collect:
    """As training does: through the pool, graded and recorded."""

    def collect(step: int) -> int:
        batch, _ = rollouts.collect(step)
        assert batch is not None  # it is on leaders, and the only rank is one
        return int(batch.mask.sum())

    return collect


def _raw(recipe: Recipe, task: Task, clients: "Sequence[Client]") -> Collect:
    """The same prompts in one request per server; the answers are only counted."""
    rollout = recipe.rollout
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, stop=tuple(rollout.stop))

    def request(client: Client, prompts: list[list[int]]) -> int:
        body = {
            "input_ids": prompts,
            "sampling_params": sampling.parameters(),
            "return_logprob": True,
            "return_routed_experts": rollout.router_replay,
        }
        answers = client.post("/generate", body)
        return sum(answer["meta_info"]["completion_tokens"] for answer in answers)

    def collect(step: int) -> int:
        prompts = task.training_prompts(step, rollout.prompts)
        ids = [prompt.ids for prompt in prompts for _ in range(rollout.samples)]
        servers = clients[: len(ids)]  # none gets an empty request
        shares = [ids[i :: len(servers)] for i in range(len(servers))]
        with ThreadPoolExecutor(len(servers)) as threads:
            return sum(threads.map(request, servers, shares))

    return collect


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
