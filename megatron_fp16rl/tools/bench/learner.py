"""Whole Megatron steps, by layout and dtype."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_fp16rl import platform
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.recipe import Layout, Precision, Recipe, RecipeError
from megatron_fp16rl.tools.bench.common import Result, Say, View, spread

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.data.batch import Batch
    from megatron_fp16rl.parallel import World

VIEW = View(
    "{platform}",
    {
        "layout": "{layout}",
        "dtype": "{dtype}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "s a step": "{seconds:.3f}",
        "spread": "{seconds_low:.3f} to {seconds_high:.3f}",
        "gradient norm": "{grad_norm:.5f}",
    },
)


@dataclass(frozen=True)
class Work:
    """What is timed: steps on `sequences` random sequences of `tokens` tokens."""

    sequences: int
    tokens: int
    repeats: int
    dtypes: Sequence[str] = ("fp32", "fp16")


def check(recipes: Sequence[Recipe], work: Work) -> None:
    """Raises RecipeError unless the sequences divide over the replicas of every layout."""
    for recipe in recipes:
        replicas = recipe.learner.data_parallel
        if work.sequences % replicas:
            raise RecipeError(
                f"--sequences {work.sequences} is not a multiple of the {replicas} data-parallel "
                f"ranks of layout {name_of(recipe.learner)}"
            )


def measure(recipes: Sequence[Recipe], work: Work, say: Say) -> Result:
    """Times whole steps (forward, backward, Adam) in each dtype, at the layout of each recipe.

    Collective over the ranks, of which all layouts have the same number. Ratios and differences
    between dtypes are those at the first layout.
    """
    from megatron.core import parallel_state

    from megatron_fp16rl.parallel import initialize

    rows = []
    for recipe in recipes:
        say(f"layout {name_of(recipe.learner)}")
        rows += _rows(recipe, initialize(recipe.learner, seed=0), work)
        parallel_state.destroy_model_parallel()
    first_layout = {row["dtype"]: row for row in rows[: len(work.dtypes)]}
    result = {"platform": platform.current().describe(), "rows": rows}
    if {"fp16", "fp32"} <= set(first_layout):
        result |= _compare(first_layout["fp16"], first_layout["fp32"])
    return result


def name_of(layout: Layout) -> str:
    """Names a layout by its settings, e.g. "4 ranks, tensor_parallel=2"."""
    fields = set(Layout.model_fields) - {"ranks", "context_parallel"}
    settings = layout.model_dump(include=fields, exclude_defaults=True)
    ranks = "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"
    return ", ".join([ranks, *(f"{key}={value}" for key, value in settings.items())])


def _compare(fp16: Result, fp32: Result) -> Result:
    ratio = statistics.median(
        a / b for a, b in zip(fp32["repeats_s"], fp16["repeats_s"], strict=True)
    )
    difference = abs(fp16["grad_norm"] / fp32["grad_norm"] - 1)
    return {
        "fp16_over_fp32": ratio,
        "grad_norm_difference": difference,
        "summary": f"fp16 runs at {ratio:.2f} of the speed of fp32; gradient norms differ by "
        f"{difference:.1e}",
    }


def _rows(recipe: Recipe, world: "World", work: Work) -> list[Result]:
    """Times one layout, turn by turn in each dtype."""
    import torch.distributed as dist

    batch = _random_batch(work, world, load_config(model_folder(recipe.model)).vocab_size)
    steps = {dtype: _stepper(recipe, dtype, world, batch) for dtype in work.dtypes}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in steps}
    # The first step warms up. Its gradient norms compare the dtypes: all start from the same weights.
    norms = {dtype: step() for dtype, step in steps.items()}
    for _ in range(work.repeats):
        for dtype, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()  # returns a number that was copied from the device, so the step is complete
            seconds[dtype].append(time.perf_counter() - began)
    tokens = work.sequences * work.tokens
    return [
        {
            "dtype": dtype,
            "layout": name_of(recipe.learner),
            "tokens_per_s": tokens / statistics.median(repeats),
            "tokens_per_s_per_rank": tokens / statistics.median(repeats) / world.size,
            **spread("seconds", repeats),
            "repeats_s": repeats,
            "grad_norm": norms[dtype],
        }
        for dtype, repeats in seconds.items()
    ]


def _stepper(recipe: Recipe, dtype: str, world: "World", batch: "Batch") -> Callable[[], float]:
    """A function that makes one optimizer step and returns its gradient norm."""
    from megatron_fp16rl.learner.learner import Learner

    in_dtype = recipe.model_copy(update={"precision": Precision(dtype=dtype)})
    learner = Learner.from_recipe(in_dtype, model_folder(recipe.model), world)
    return lambda: learner.supervised_step(batch)[0].grad_norm


def _random_batch(work: Work, world: "World", vocabulary: int) -> "Batch":
    """This data-parallel rank's share of random sequences, the same at every layout."""
    import torch

    from megatron_fp16rl.data.batch import Batch

    generator = torch.Generator().manual_seed(0)
    shape = (work.sequences, work.tokens)
    tokens = torch.randint(2, vocabulary, shape, generator=generator)
    rows = torch.arange(world.data.rank, work.sequences, world.data.size)
    return Batch.from_token_ids(tokens[rows].tolist()).to(world.device)
