"""What the benchmarks share: the recipe to measure, the machine's facts and spreads."""

import datetime
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_fp16rl import platform
from megatron_fp16rl.platform import installed
from megatron_fp16rl.recipe import Recipe, load
from megatron_fp16rl.recipe.notation import setting
from megatron_fp16rl.tools import recipes

K = TypeVar("K")
V = TypeVar("V")
Say = Callable[[str], None]
Result = dict[str, Any]  # as --json prints it

_BUILT_IN = Path(__file__).parent / "recipe.yaml"
# A large alphabet, 1,024 tokens: a response that ends early measures nothing.
_ALPHABET = "0123456789+=" + "".join(chr(0x4E00 + i) for i in range(1010))


def load_recipe(path: Path | None, overrides: Sequence[str], ranks: int | None = None) -> Recipe:
    """Loads the recipe at `path`, or of that name, or the built-in one with a small random model.

    ranks: of the learner, in place of the recipe's. Raises RecipeError.
    """
    settings = [] if ranks is None else [f"learner.ranks={ranks}"]
    if path is None:
        settings.append(setting("model.build.alphabet", _ALPHABET))
    return load(_BUILT_IN if path is None else recipes.find(str(path)), [*settings, *overrides])


def facts() -> Result:
    """Describes this machine, and the hosts of all ranks. Collective if there are ranks."""
    import torch.distributed as dist

    host = socket.gethostname()
    hosts = [host] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(hosts, host)
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.current().describe(),
        "versions": installed.versions(),
        "hosts": hosts,  # one entry per rank
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeats, as `name`, `name`_low and `name`_high."""
    return {
        name: statistics.median(values),
        f"{name}_low": min(values),
        f"{name}_high": max(values),
    }


def in_turns(
    works: Mapping[K, Callable[[], V]], repeats: int
) -> tuple[dict[K, V], dict[K, list[tuple[float, float]]]]:
    """What each returns when it first runs, to warm up; then its seconds and CPU seconds on this rank. Collective."""
    import torch
    import torch.distributed as dist

    first = {key: work() for key, work in works.items()}
    times: dict[K, list[tuple[float, float]]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            dist.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[key].append((time.perf_counter() - began, time.process_time() - cpu))
    return first, times
