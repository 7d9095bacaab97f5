"""Whole Megatron steps, by layout and dtype."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl import platform
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.recipe import Layout, Precision, Recipe, RecipeError

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.data.batch import Batch
    from megatron_fp16rl.parallel import World

_WORDS = tuple(name for name in Layout.model_fields if name not in ("ranks", "context_parallel"))


@dataclass(frozen=True)
class Work:
    """What is timed: steps on `sequences` random sequences of `tokens` tokens."""

    sequences: int
    tokens: int
    repeats: int
    dtypes: Sequence[str] = ("fp32", "fp16")


def check(recipes: Sequence[Recipe], work: Work) -> None:
    """Raises RecipeError unless the sequences can be shared out at every layout."""
    for recipe in recipes:
        replicas = recipe.learner.data_parallel
        if work.sequences % replicas:
            raise RecipeError(
                f"--sequences {work.sequences} is not a multiple of the {replicas} data-parallel "
                f"ranks of layout {name_of(recipe.learner)}"
            )


def measure(recipes: Sequence[Recipe], work: Work, say: Callable[[str], None]) -> dict[str, object]:
    """One whole step (forward, backward, Adam) in each dtype, turn by turn, at the layout of each recipe.

    Collective over the ranks, of which all layouts have the same number. Ratios and differences
    between dtypes are those at the first layout.
    """
    from megatron.core import parallel_state

    from megatron_fp16rl.parallel import initialize

    rows = []
    for recipe in recipes:
        say(f"layout {name_of(recipe.learner)}")
        rows += _at_layout(recipe, initialize(recipe.learner, seed=0), work)
        parallel_state.destroy_model_parallel()
    first = {row["dtype"]: row for row in rows[: len(work.dtypes)]}
    return {**_fp16_against_fp32(first), "platform": platform.current().describe(), "rows": rows}


def name_of(layout: Layout) -> str:
    """E.g. "4 ranks, tensor_parallel=2"."""
    ranks = "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"
    default = Layout()
    said = [
        f"{word}={getattr(layout, word)}"
        for word in _WORDS
        if getattr(layout, word) != getattr(default, word)
    ]
    return ", ".join([ranks, *said])


def _fp16_against_fp32(rows: dict[str, dict]) -> dict[str, float]:
    if not {"fp16", "fp32"} <= set(rows):
        return {}
    fp16, fp32 = rows["fp16"], rows["fp32"]
    ratios = [a / b for a, b in zip(fp32["repeats_s"], fp16["repeats_s"], strict=True)]
    return {
        "fp16_over_fp32": statistics.median(ratios),
        "grad_norm_difference": abs(fp16["grad_norm"] / fp32["grad_norm"] - 1),
    }


def _at_layout(recipe: Recipe, world: "World", work: Work) -> list[dict[str, object]]:
    import torch.distributed as dist

    folder = model_folder(recipe.model)
    batch = _random_batch(work, world, load_config(folder).vocab_size)
    steps = {dtype: _stepper(recipe, dtype, folder, world, batch) for dtype in work.dtypes}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in steps}
    norms = {dtype: step() for dtype, step in steps.items()}  # warm-up; all from the same weights
    for _ in range(work.repeats):
        for dtype, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()  # ends with a number that has come from the device
            seconds[dtype].append(time.perf_counter() - began)
    count = work.sequences * work.tokens
    return [
        {
            "dtype": dtype,
            "layout": name_of(recipe.learner),
            "tokens_per_s": count / statistics.median(own),
            "tokens_per_s_per_rank": count / statistics.median(own) / world.size,
            "seconds": statistics.median(own),
            "repeats_s": own,
            "grad_norm": norms[dtype],
        }
        for dtype, own in seconds.items()
    ]


def _stepper(
    recipe: Recipe, dtype: str, folder: Path, world: "World", batch: "Batch"
) -> Callable[[], float]:
    """A function that makes one optimizer step and returns its gradient norm."""
    from megatron_fp16rl.learner.learner import Learner

    in_dtype = recipe.model_copy(update={"precision": Precision(dtype=dtype)})
    trained = Learner.from_recipe(in_dtype, folder, world)
    return lambda: trained.supervised_step(batch)[0].grad_norm


def _random_batch(work: Work, world: "World", vocabulary: int) -> "Batch":
    """This data-parallel rank's share of the same random sequences at every layout."""
    import torch

    from megatron_fp16rl.data.batch import Batch

    generator = torch.Generator().manual_seed(0)
    shape = (work.sequences, work.tokens)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, 0] = False
    whole = Batch(
        tokens=torch.randint(2, vocabulary, shape, generator=generator),
        lengths=torch.full((work.sequences,), work.tokens),
        mask=mask,
        mu_logprobs=torch.zeros(shape),
        rewards=torch.ones(work.sequences),
        groups=torch.arange(work.sequences),
        truncated=torch.zeros(work.sequences, dtype=torch.bool),
    )
    mine = torch.arange(world.data.rank, work.sequences, world.data.size)
    return whole.rows(mine).to(world.device)
