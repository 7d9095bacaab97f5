"""Whole Megatron steps (forward, backward, Adam) in each dtype; scoring and updates packed, in rows and bare."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.parallel import World, initialize
from megatron_fp16rl.recipe import Dtype, Layout, Precision, Recipe
from megatron_fp16rl.tools.bench.common import Result, in_turns, spread

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

Variant = Literal["packed", "rows", "bare"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_LONGEST = 4  # times the mean, where lengths vary
# -> the gradient norm; None after an overflow, or without an update
Work = Callable[[], float | None]


def measure(
    recipe: Recipe, dtypes: Sequence[Dtype], sequences: int, tokens: int, repeats: int
) -> Result:
    """Times steps on `sequences` random sequences of `tokens` tokens in each dtype. Collective."""
    from megatron_fp16rl.learner.learner import Learner

    world = initialize(recipe.learner, seed=0)
    batch = random_batch(recipe, world, [tokens] * sequences)
    works: dict[str, Work] = {}
    for dtype in dtypes:
        precision = Precision(dtype=dtype, head=recipe.precision.head)
        changed = recipe.model_copy(update={"precision": precision})
        learner = Learner.from_recipe(changed, model_folder(recipe.model), world)
        works[dtype] = _update(learner, batch)
    # Gradient norms compare the dtypes: all start from the same weights.
    norms, times = in_turns(works, repeats)
    seconds = {dtype: [wall for wall, _ in own] for dtype, own in times.items()}
    speeds = {dtype: sequences * tokens / statistics.median(own) for dtype, own in seconds.items()}
    rows: list[Result] = [
        {
            "dtype": dtype,
            "layout": name_of(recipe.learner),
            "tokens_per_s": speeds[dtype],
            "tokens_per_s_per_rank": speeds[dtype] / world.size,
            **spread("seconds", own),
            "grad_norm": norms[dtype],
        }
        for dtype, own in seconds.items()
    ]
    result: Result = {"platform": platform.current().describe(), "rows": rows}
    if {"fp16", "fp32"} <= set(seconds):
        pairs = zip(seconds["fp32"], seconds["fp16"], strict=True)
        result["fp16_over_fp32"] = statistics.median(slow / fast for slow, fast in pairs)
        fp16, fp32 = norms["fp16"], norms["fp32"]
        if fp16 and fp32:  # fp16 has none where it overflowed
            result["grad_norm_difference"] = abs(fp16 / fp32 - 1)
    return result


def compare(
    recipe: Recipe,
    variants: Sequence[Variant],
    sequences: int,
    tokens: int,
    varied: bool,
    repeats: int,
) -> Result:
    """Tokens of sequences (not of padding) a second and a CPU second, of each variant. Collective.

    `bare` is Megatron's schedule, loss and optimizer on the same packed micro-batches, without scoring.
    varied: lengths are exponential with a mean of `tokens`, at most four times that; else all are `tokens`.
    CPU seconds are rank 0's.
    """
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.tools.bench.bare import bare

    world = initialize(recipe.learner, seed=0)
    lengths = _varied(sequences, tokens) if varied else [tokens] * sequences
    batch, total = random_batch(recipe, world, lengths), sum(lengths)
    works: dict[tuple[Variant, str], Work] = {}
    padding: dict[Variant, float] = {}
    for variant in variants:
        settings = recipe.learner.model_copy(update={"packing": variant != "rows"})
        changed = recipe.model_copy(update={"learner": settings})
        learner = Learner.from_recipe(changed, model_folder(recipe.model), world)
        if variant == "bare":
            works[variant, "update"] = bare(learner, batch)
        else:
            works[variant, "score"] = _score(learner, batch)
            works[variant, "update"] = _update(learner, batch)
        run = sum(m.tokens for m in learner.forward.micro_batches(batch))
        padding[variant] = 1 - int(batch.lengths.sum()) / run
    norms, times = in_turns(works, repeats)
    rows: list[Result] = [
        {
            "variant": variant,
            "pass": name,
            "dtype": recipe.precision.dtype,
            "layout": name_of(recipe.learner),
            "padding_fraction": padding[variant],
            "tokens_per_s": total / statistics.median(wall for wall, _ in own),
            "tokens_per_cpu_s": total / statistics.median(cpu for _, cpu in own),
            **spread("seconds", [wall for wall, _ in own]),
            "grad_norm": norms[variant, name],
        }
        for (variant, name), own in times.items()
    ]
    return {
        "platform": platform.current().describe(),
        "tokens": total,
        "longest": max(lengths),
        "rows": rows,
        "cpu_speed_ratios": _cpu_speed_ratios(times, variants[0]),
    }


def _varied(sequences: int, mean: int) -> list[int]:
    """Exponential lengths, at most _LONGEST times their mean."""
    draw = random.Random(0)
    drawn = (2 + int(draw.expovariate(1 / mean)) for _ in range(sequences))
    return [min(_LONGEST * mean, length) for length in drawn]


def _cpu_speed_ratios(
    times: Mapping[tuple[Variant, str], list[tuple[float, float]]], first: Variant
) -> dict[str, float]:
    """How many times the tokens a CPU second of the others `first` has, turn by turn."""
    return {
        f"{name}_{first}_over_{variant}": statistics.median(
            other / own for (_, other), (_, own) in zip(turns, times[first, name], strict=True)
        )
        for (variant, name), turns in times.items()
        if variant != first
    }


def _score(learner: "Learner", batch: Batch) -> Work:
    def score() -> None:
        learner.score(batch)

    return score


def _update(learner: "Learner", batch: Batch) -> Work:
    return lambda: learner.supervised_update(batch)[0].grad_norm


def name_of(layout: Layout) -> str:
    """Names a layout by its settings, e.g. "4 ranks, tensor_parallel=2"."""
    fields = set(Layout.model_fields) - {"ranks"}
    settings = layout.model_dump(include=fields, exclude_defaults=True)
    ranks = "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"
    return ", ".join([ranks, *(f"{key}={value}" for key, value in settings.items())])


def random_batch(recipe: Recipe, world: World, lengths: Sequence[int]) -> Batch:
    """This data-parallel rank's share of random sequences of these lengths, the same at every layout."""
    vocabulary = load_config(model_folder(recipe.model)).vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, vocabulary, (sum(lengths),), generator=generator)
    sequences = [part.tolist() for part in tokens.split(list(lengths))]
    return Batch.from_token_ids(sequences[world.data.rank :: world.data.size]).to(world.device)
