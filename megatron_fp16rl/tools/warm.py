"""Starts one server once, so that kernels are compiled before many servers start."""

import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.utils import cache

_PROMPT, _NEW_TOKENS = [1, 2, 3, 4], 8


def warm(recipe: Recipe) -> dict[str, Any]:
    """Starts one of the recipe's servers on this machine, requests a response, and stops it.

    Returns the seconds of each, and the folder of the kernels. Raises RecipeError if the recipe has
    no servers; ServerDied or ServerError, with the server's last log lines, if it does not start or answer.
    """
    if recipe.rollout.replay is not None:
        raise RecipeError("rollout.replay: there are no servers to start; set it to null")
    config, weights = ServerConfig.of(recipe), model_folder(recipe.model)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fp16rl-warm-") as logs:
        with launch_servers(config, weights, Path(logs)) as (server,):
            up = time.monotonic()
            client = Client(server.endpoint, recipe.rollout.request_timeout_s)
            client.generate([_PROMPT], Sampling(_NEW_TOKENS))
            answered = time.monotonic()
    return {
        "start_s": up - began,
        "answer_s": answered - up,
        "kernels": str(cache.kernels()),
    }
