"""One server, started once: what its model's kernels are compiled into is there when many servers start."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.utils import cache

_PROMPT, _NEW_TOKENS = [1, 2, 3, 4], 8


def warm(recipe: Recipe, progress: Callable[[str], None]) -> dict[str, object]:
    """Starts one of the recipe's servers on this machine, lets it answer, and stops it.

    Returns how many seconds each took, and where kernels are kept. Raises RecipeError if the recipe has
    no servers; ServerDied or ServerError, with the server's last words, if it does not come up or answer.
    """
    if recipe.rollout.replay is not None:
        raise RecipeError("rollout.replay: there are no servers to start; set it to null")
    config, weights = ServerConfig.of(recipe), model_folder(recipe.model)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fp16rl-warm-") as logs:
        with launch_servers(config, weights, Path(logs), progress=progress) as (endpoint,):
            up = time.monotonic()
            client = Client(endpoint, recipe.rollout.request_timeout_s)
            client.generate([_PROMPT], Sampling(_NEW_TOKENS))
            answered = time.monotonic()
    return {
        "start_s": up - began,
        "answer_s": answered - up,
        "kernels": str(cache.kernels()),
    }
