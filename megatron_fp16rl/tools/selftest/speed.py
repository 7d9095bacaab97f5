"""Row speed: a learner against the fastest matrix product of the same GPU."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.models.build import build
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.lengths import longest
from megatron_fp16rl.tools.selftest import memory, models
from megatron_fp16rl.tools.selftest.result import Check, NotHere, Setting, at_least, at_most, shown

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

_REPEATS = 5
_SIDE = 8192
# Attention, norms and the optimizer are no large products. Planner: 0.5 (plan/times.py).
_SCORE, _UPDATE = 0.3, 0.25
_BACKWARD = 4.0  # an update is three forward passes, and Adam
_FUSION = 0.97


class Speeds(NamedTuple):
    """Seconds of a score and of an update, operations of a forward pass, of a product, per second."""

    score_s: float
    update_s: float
    flops: float
    product_flops_per_s: float
    tokens: int


def speed(setting: Setting) -> list[Check]:
    """Four layers of a dense model in fp16, sixteen sequences; with and without the fused activation."""
    if platform.current().NAME != "cuda":
        raise NotHere("no GPU: its products are what this is measured by")
    recipe = memory.recipe(*memory.LARGE)
    fused, plain = measured(recipe, setting, _SIDE)
    return judge(fused, plain)


def measured(recipe: Recipe, setting: Setting, side: int) -> tuple[Speeds, Speeds]:
    """As the platform has it, and with `bias_activation_fusion` off."""
    assert recipe.model.build is not None
    folder = setting.folder / "model"
    build(recipe.model.build, folder)
    world = models.world()
    from megatron_fp16rl.learner.learner import Learner

    seq = longest(recipe).sequence
    batch = Batch.from_token_ids(
        models.random_tokens(lengths=(seq,) * recipe.learner.global_batch_size)
    )
    product, speeds = _product(side), []
    for options in ({}, {"bias_activation_fusion": False}):
        settings = recipe.learner.model_copy(update={"megatron": options})
        learner = Learner.from_recipe(
            recipe.model_copy(update={"learner": settings}), folder, world
        )
        speeds.append(_speeds(learner, batch, product))
        del learner
    return speeds[0], speeds[1]


def _speeds(learner: "Learner", batch: Batch, product: float) -> Speeds:
    batch = learner.share(batch)
    lengths = batch.lengths.tolist()
    outputs = learner.costs.output_flops * sum(length - 1 for length in lengths)
    return Speeds(
        _seconds(lambda: learner.score(batch)),
        _seconds(lambda: learner.supervised_update(batch)),
        sum(learner.costs.work(length) for length in lengths) + outputs,
        product,
        sum(lengths),
    )


def _product(side: int) -> float:
    """Operations a second of a large fp16 product."""
    device = platform.current().device()
    left, right = (torch.randn(side, side, device=device).half() for _ in range(2))
    return 2 * side**3 / _seconds(lambda: torch.nn.functional.linear(left, right))


def _seconds(work: Callable[[], object]) -> float:
    """The least of several, after one to warm up."""

    def timed() -> float:
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    timed()
    return min(timed() for _ in range(_REPEATS))


def judge(fused: Speeds, plain: Speeds) -> list[Check]:
    """Shares of the product's speed, and ratios."""
    score = fused.flops / fused.score_s / fused.product_flops_per_s
    update = 3 * fused.flops / fused.update_s / fused.product_flops_per_s
    return [
        shown("TFLOP/s of a large product", fused.product_flops_per_s / 1e12),
        shown("tokens a second, update", fused.tokens / fused.update_s),
        at_least("of the product's speed, score", score, _SCORE),
        at_least("of the product's speed, update", update, _UPDATE),
        at_most("an update over a score", fused.update_s / fused.score_s, _BACKWARD),
        at_least(
            "without the fused activation over with it", plain.update_s / fused.update_s, _FUSION
        ),
    ]
