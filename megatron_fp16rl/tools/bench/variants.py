"""The learner's scoring and updates packed, in rows, and beside a bare Megatron step, turn by turn."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_fp16rl import platform
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.recipe import Dtype, Precision, Recipe
from megatron_fp16rl.tools.bench.common import Result, spread
from megatron_fp16rl.tools.bench.learner import name_of, random_batch

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    import torch

    from megatron_fp16rl.data.batch import Batch
    from megatron_fp16rl.data.micro_batches import MicroBatch
    from megatron_fp16rl.learner.arrangement import Arrangement
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.learner.model import Model
    from megatron_fp16rl.parallel import World

Variant = Literal["packed", "rows", "bare"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_LONGEST = 4  # times the mean, where lengths vary


def measure(
    recipe: Recipe,
    dtype: Dtype,
    variants: Sequence[Variant],
    sequences: int,
    tokens: int,
    varied: bool,
    repeats: int,
) -> Result:
    """Tokens of sequences (not of padding) a second and a CPU second, of each variant.

    `bare` is Megatron's schedule, loss and optimizer on the same packed micro-batches, without scoring.
    varied: lengths are exponential with a mean of `tokens`, at most four times that; else all are `tokens`.
    Collective over the learner's ranks; CPU seconds are rank 0's.
    """
    from megatron_fp16rl.parallel import initialize

    world = initialize(recipe.learner, seed=0)
    lengths = _lengths(sequences, tokens, varied)
    batch = random_batch(lengths, world, load_config(model_folder(recipe.model)))
    works, padding = _works(recipe, dtype, variants, world, batch)
    # To warm up. Gradient norms compare the variants: all start from the same weights.
    norms = {key: work() for key, work in works.items()}
    taken: dict[tuple[Variant, str], list[tuple[float, float]]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            taken[key].append(_timed(work))
    total = sum(lengths)
    rows: list[Result] = [
        {
            "variant": variant,
            "pass": name,
            "dtype": dtype,
            "layout": name_of(recipe.learner),
            "padding_fraction": padding[variant],
            "tokens_per_s": total / statistics.median(wall for wall, _ in times),
            "tokens_per_cpu_s": total / statistics.median(cpu for _, cpu in times),
            **spread("seconds", [wall for wall, _ in times]),
            "grad_norm": norms[variant, name],
        }
        for (variant, name), times in taken.items()
    ]
    ratios = {
        f"{name}_{variants[0]}_over_{variant}": statistics.median(
            other / first
            for (_, other), (_, first) in zip(times, taken[variants[0], name], strict=True)
        )
        for (variant, name), times in taken.items()
        if variant != variants[0]
    }
    return {
        "platform": platform.current().describe(),
        "tokens": total,
        "longest": max(lengths),
        "rows": rows,
        "cpu_speed_ratios": ratios,
    }


def _works(
    recipe: Recipe, dtype: Dtype, variants: Sequence[Variant], world: "World", batch: "Batch"
) -> tuple[dict[tuple[Variant, str], Callable[[], float | None]], dict[Variant, float]]:
    """What is timed, by variant and pass (updates return their gradient norm); and what is padding."""
    from megatron_fp16rl.learner.learner import Learner

    works: dict[tuple[Variant, str], Callable[[], float | None]] = {}
    padding: dict[Variant, float] = {}
    for variant in variants:
        learner_settings = recipe.learner.model_copy(update={"packing": variant != "rows"})
        update = {
            "precision": Precision(dtype=dtype, head=recipe.precision.head),
            "learner": learner_settings,
        }
        learner = Learner.from_recipe(
            recipe.model_copy(update=update), model_folder(recipe.model), world
        )
        if variant == "bare":
            works[variant, "update"] = _bare(learner, batch)
        else:
            works[variant, "score"] = partial(_score, learner, batch)
            works[variant, "update"] = partial(_update, learner, batch)
        run = sum(m.tokens for m in learner.forward.micro_batches(batch))
        padding[variant] = 1 - int(batch.lengths.sum()) / run
    return works, padding


def _score(learner: "Learner", batch: "Batch") -> None:
    learner.score(batch)


def _update(learner: "Learner", batch: "Batch") -> float | None:
    return learner.supervised_update(batch)[0].grad_norm


def _bare(learner: "Learner", batch: "Batch") -> Callable[[], float | None]:
    """A step as Megatron's own examples make it. learner: gives the micro-batches and the settings."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_fp16rl.learner.arrangement import arrange
    from megatron_fp16rl.learner.loading import load
    from megatron_fp16rl.learner.model import Model

    world, settings, dtype = learner.world, learner.settings, learner.precision.dtype
    spec = describe(load_config(learner.hf_dir), world.layout)
    model = Model(spec, dtype, world, settings.distributed_optimizer, settings.megatron)
    load(model, HFFolder(learner.hf_dir))
    optimizer = _bare_optimizer(learner, model)
    model.config.grad_scale_func = optimizer.scale_loss
    schedule, micro_batches = get_forward_backward_func(), learner.forward.micro_batches(batch)
    total = batch.mask.sum()

    def data() -> Iterator[dict[str, Any]]:
        return (_inputs(batch, m, arrange(m, world.context)) for m in micro_batches)

    def forward(
        iterator: Iterator[dict[str, Any]], chunk: "torch.nn.Module"
    ) -> tuple["torch.Tensor", Callable[["torch.Tensor"], tuple["torch.Tensor", Any]]]:
        inputs = next(iterator)
        mask = inputs.pop("loss_mask")
        scale = len(micro_batches) * world.data.size / total

        def loss(of_tokens: "torch.Tensor") -> tuple["torch.Tensor", Any]:
            return (of_tokens.float() * mask).sum() * scale, {}

        return chunk(**inputs), loss

    def step() -> float | None:
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
            chunk.train()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward,
            data_iterator=[data() for _ in model.chunks] if len(model.chunks) > 1 else data(),
            model=model.chunks,
            num_microbatches=len(micro_batches),
            seq_length=max(m.shape[1] for m in micro_batches),
            micro_batch_size=1,
            forward_only=False,
        )
        norm: float | None = optimizer.step()[1]
        return norm

    return step


def _bare_optimizer(learner: "Learner", model: "Model") -> Any:
    """Megatron's own, with its own loss scaler."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=learner.settings.optimizer.lr,
        fp16=learner.precision.dtype == "fp16",
        bf16=learner.precision.dtype == "bf16",
        params_dtype=model.dtype,
        use_distributed_optimizer=learner.settings.distributed_optimizer,
        initial_loss_scale=learner.precision.loss_scale.initial,
        clip_grad=0.0,  # the norm is computed all the same; Megatron clips gradients of GPUs only
    )
    optimizer = get_megatron_optimizer(config, model.chunks)
    for part in optimizer.chained_optimizers:
        platform.current().tune_optimizer(part)
    return optimizer


def _inputs(
    batch: "Batch", micro_batch: "MicroBatch", arrangement: "Arrangement"
) -> dict[str, Any]:
    """Arguments of the model, and the mask of the tokens whose loss counts: of those that come before them."""
    from torch.nn.functional import pad

    rows = batch.rows(micro_batch.sequences, max(micro_batch.lengths))
    labels, counts = (pad(tensor[:, 1:], (0, 1)) for tensor in (rows.tokens, rows.mask))
    return {
        "input_ids": arrangement.take(rows.tokens, 0),
        "position_ids": None,
        "attention_mask": None,
        "labels": arrangement.take(labels, 0),
        "loss_mask": arrangement.take(counts.float(), 0),
        "packed_seq_params": arrangement.packed(1, rows.tokens.device),
    }


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this rank."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - cpu


def _lengths(sequences: int, tokens: int, varied: bool) -> list[int]:
    if not varied:
        return [tokens] * sequences
    draw = random.Random(0)
    most = _LONGEST * tokens
    return [min(most, 2 + int(draw.expovariate(1 / tokens))) for _ in range(sequences)]
