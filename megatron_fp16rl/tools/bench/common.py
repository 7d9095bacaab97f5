"""What the benchmarks share: the recipe to measure, the machine's facts, spreads and tables."""

import datetime
import os
import socket
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from megatron_fp16rl import platform
from megatron_fp16rl.platform import installed
from megatron_fp16rl.recipe import Recipe, RecipeError, load
from megatron_fp16rl.recipe.notation import setting

Say = Callable[[str], None]
Result = dict[str, Any]  # as --json prints it

_BUILT_IN = Path(__file__).parent / "recipe.yaml"
# A large alphabet, 1,024 tokens: a response that ends early measures nothing.
_ALPHABET = "0123456789+=" + "".join(chr(0x4E00 + i) for i in range(1010))
_PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "megatron-fp16rl")


def load_recipe(
    path: Path | None,
    overrides: Sequence[str],
    ranks: int | None = None,
    layers: int = 4,
    hidden: int = 256,
) -> Recipe:
    """Loads the recipe at `path`, or the built-in one with a random model of this size.

    ranks: of the learner, in place of the recipe's. Raises RecipeError.
    """
    if path is not None:
        of_ranks = [] if ranks is None else [f"learner.ranks={ranks}"]
        return load(path, [*of_ranks, *overrides])
    ranks = ranks or 1
    config = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
    }
    built_in = [
        *(f"model.build.config.{key}={value}" for key, value in config.items()),
        setting("model.build.alphabet", _ALPHABET),
        f"learner.ranks={ranks}",
        f"rollout.prompts={ranks}",
        f"learner.global_batch_size={8 * ranks}",
    ]
    return load(_BUILT_IN, [*built_in, *overrides])


def job_overrides(nodes: int, servers: bool) -> list[str]:
    """Overrides with which a recipe is checked against a job of `nodes` nodes.

    servers: whether the benchmark starts the recipe's, which then share the nodes with the learner.
    Otherwise one small server on another node keeps the recipe valid and takes no devices.
    """
    shared = ["slurm.rollout_nodes=0"]
    elsewhere = ["slurm.rollout_nodes=1", "rollout.servers=1", "rollout.tensor_parallel=1"]
    placement = shared if servers else elsewhere
    return [f"slurm.learner_nodes={nodes}", *placement, "slurm.rollout_partition=null"]


def require_servers(recipe: Recipe) -> None:
    """Raises RecipeError if the recipe replays rollouts, so that it has no servers to measure."""
    if recipe.rollout.replay is not None:
        raise RecipeError("rollout.replay: there are no servers to measure; set it to null")


def facts() -> Result:
    """Describes this machine, and the hosts of all ranks. Collective if there are ranks."""
    import torch
    import torch.distributed as dist

    host = socket.gethostname()
    hosts = [host] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(hosts, host)
    versions = {name: version for name in _PACKAGES if (version := installed.version(name))}
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.current().describe(),
        "versions": {"python": sys.version.split()[0], **versions},
        "hosts": hosts,  # one entry per rank
        "cpus": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "load": os.getloadavg()[0],  # over the last minute, this benchmark included
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeats, as `name`, `name`_low and `name`_high."""
    return {
        name: statistics.median(values),
        f"{name}_low": min(values),
        f"{name}_high": max(values),
    }


@dataclass(frozen=True)
class View:
    """How a result is shown: a format string over the result, and one per column over each row."""

    title: str
    columns: dict[str, str]

    def table(self, result: Result) -> Table:
        """One line per row of the result. No value is a dash, a list is joined by commas."""
        table = Table(title=self.title.format_map(result), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in self.columns:
            table.add_column(column, no_wrap=True)
        for row in result["rows"]:
            values = {key: "-" if value is None else value for key, value in row.items()}
            values |= {k: ", ".join(v) for k, v in row.items() if k == "slow_ranks"}
            table.add_row(*(cell.format_map(values) for cell in self.columns.values()))
        return table
