"""A bare Megatron step: its own schedule, loss and optimizer, on the learner's micro-batches."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.data.micro_batches import MicroBatch
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.spec import describe

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.arrangement import Arrangement
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.learner.model import Model


def bare(learner: "Learner", batch: Batch) -> Callable[[], float | None]:
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


def _inputs(batch: Batch, micro_batch: MicroBatch, arrangement: "Arrangement") -> dict[str, Any]:
    """Arguments of the model, and the mask of the tokens whose loss counts: of those that come before them."""
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
