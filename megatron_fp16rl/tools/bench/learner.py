"""Whole Megatron steps (forward, backward, Adam) in each dtype."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_fp16rl import platform
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.recipe import Dtype, Layout, Precision, Recipe
from megatron_fp16rl.tools.bench.common import Result, spread

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from transformers import PretrainedConfig

    from megatron_fp16rl.data.batch import Batch
    from megatron_fp16rl.parallel import World


def measure(
    recipe: Recipe, dtypes: Sequence[Dtype], sequences: int, tokens: int, repeats: int
) -> Result:
    """Times steps on `sequences` random sequences of `tokens` tokens, turn by turn in each dtype.

    Collective over the learner's ranks. `sequences` must be a multiple of the data-parallel ranks.
    """
    import torch.distributed as dist

    from megatron_fp16rl.parallel import initialize

    world = initialize(recipe.learner, seed=0)
    batch = random_batch([tokens] * sequences, world, load_config(model_folder(recipe.model)))
    steps = {dtype: _stepper(recipe, dtype, world, batch) for dtype in dtypes}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in steps}
    # The first step warms up. Its gradient norms compare the dtypes: all start from the same weights.
    norms: dict[str, float | None] = {dtype: step() for dtype, step in steps.items()}
    for _ in range(repeats):
        for dtype, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()  # returns a number that was copied from the device, so the step is complete
            seconds[dtype].append(time.perf_counter() - began)
    rows: dict[str, Result] = {
        dtype: {
            "dtype": dtype,
            "layout": name_of(recipe.learner),
            "tokens_per_s": sequences * tokens / statistics.median(own),
            "tokens_per_s_per_rank": sequences * tokens / statistics.median(own) / world.size,
            **spread("seconds", own),
            "grad_norm": norms[dtype],
        }
        for dtype, own in seconds.items()
    }
    result: Result = {"platform": platform.current().describe(), "rows": list(rows.values())}
    if {"fp16", "fp32"} <= set(rows):
        pairs = zip(seconds["fp32"], seconds["fp16"], strict=True)
        result["fp16_over_fp32"] = statistics.median(slow / fast for slow, fast in pairs)
        fp16, fp32 = norms["fp16"], norms["fp32"]
        if fp16 and fp32:  # fp16 has none where it overflowed
            result["grad_norm_difference"] = abs(fp16 / fp32 - 1)
    return result


def name_of(layout: Layout) -> str:
    """Names a layout by its settings, e.g. "4 ranks, tensor_parallel=2"."""
    fields = set(Layout.model_fields) - {"ranks"}
    settings = layout.model_dump(include=fields, exclude_defaults=True)
    ranks = "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"
    return ", ".join([ranks, *(f"{key}={value}" for key, value in settings.items())])


def _stepper(
    recipe: Recipe, dtype: Dtype, world: "World", batch: "Batch"
) -> Callable[[], float | None]:
    """A function that makes one optimizer step; it returns the gradient norm, None after an overflow."""
    from megatron_fp16rl.learner.learner import Learner

    in_dtype = recipe.model_copy(
        update={"precision": Precision(dtype=dtype, head=recipe.precision.head)}
    )
    learner = Learner.from_recipe(in_dtype, model_folder(recipe.model), world)
    return lambda: learner.supervised_update(batch)[0].grad_norm


def random_batch(lengths: Sequence[int], world: "World", config: "PretrainedConfig") -> "Batch":
    """This data-parallel rank's share of random sequences of these lengths, the same at every layout."""
    import torch

    from megatron_fp16rl.data.batch import Batch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, config.vocab_size, (sum(lengths),), generator=generator)
    sequences = [part.tolist() for part in tokens.split(list(lengths))]
    return Batch.from_token_ids(sequences[world.data.rank :: world.data.size]).to(world.device)
