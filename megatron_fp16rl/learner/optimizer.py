"""Megatron's optimizers, stepped together under one loss scaler."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_fp16rl import platform
from megatron_fp16rl.learner.loss_scale import LossScaler, underflow_fraction
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.recipe import TORCH_DTYPES
from megatron_fp16rl.recipe import Optimizer as Settings


class NonFiniteGradient(RuntimeError):
    """A gradient was not finite and no loss scale can be lowered (bf16, fp32)."""


class TooManySkips(RuntimeError):
    """The loss scale fell and fell, yet gradients keep overflowing."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did. A skipped step has neither gradient norm nor learning rate."""

    stepped: bool
    grad_norm: float | None = None
    lr: float | None = None
    overflow_source: str | None = None
    underflow_fraction: float | None = None


class Optimizer:
    """Adam over fp32 main parameters, with warm-up and decay that advance only on good steps."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        dtype: str,
        distributed: bool,
        total_updates: int,
        scaler: LossScaler | None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.scaler = scaler
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            fp16=dtype == "fp16",
            bf16=dtype == "bf16",
            params_dtype=getattr(torch, TORCH_DTYPES[dtype]),
            initial_loss_scale=scaler.settings.initial if scaler else 1.0,
            use_distributed_optimizer=distributed,
        )
        self.megatron = get_megatron_optimizer(
            config, model.chunks, config_overrides=get_standard_config_overrides(config)
        )
        assert isinstance(self.megatron, ChainedOptimizer)
        for part in self.parts:
            platform.current().tune_optimizer(part)
            if scaler:
                part.grad_scaler = scaler  # one scaler, in place of one for each part
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_updates,
            lr_decay_steps=max(total_updates, settings.warmup_updates + 1),
            lr_decay_style=settings.decay,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    @property
    def parts(self) -> list[object]:
        """Megatron's optimizers: one for dense parameters, one for experts."""
        return self.megatron.chained_optimizers

    def zero_grad(self) -> None:
        """Clears gradients and their buffers."""
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self) -> StepOutcome:
        """Unscales once, checks, clips, steps; or skips, on every rank alike.

        Upstream, each part unscales and updates a scaler of its own (ChainedOptimizer.prepare_grads
        of megatron-core 0.16.1), and found_inf is reduced over part of the world only.
        """
        gradients = self._main_gradients()
        underflow = None
        if self.scaler is not None:
            underflow = underflow_fraction(gradients, self.scaler.scale.device)
            found_inf = self.scaler.unscale(gradients)
            self.scaler.update(found_inf)
            if found_inf:
                return self._skip()
        norm = float(self.megatron.get_grad_norm())
        if not norm < float("inf"):  # also true of nan
            raise NonFiniteGradient(
                f"gradient norm is {norm}; first non-finite gradient: {self._overflow_source()}"
            )
        coefficient = self.settings.clip_grad / (norm + 1e-6)
        if coefficient < 1.0 and gradients:
            torch._foreach_mul_(gradients, coefficient)
        self.schedule.step(increment=1)
        for part in self.parts:
            part.step_with_ready_grads()
        lr = self.schedule.get_lr({})
        return StepOutcome(True, norm, lr, underflow_fraction=underflow)

    def _main_gradients(self) -> list[torch.Tensor]:
        """This rank's fp32 gradients, in the place where the optimizers will read them."""
        gradients = []
        for part in self.parts:
            if part.is_stub_optimizer:
                continue
            if isinstance(part, FP32Optimizer):
                part.prepare_grads()
                gradients += [p.grad for p in part.get_parameters() if p.grad is not None]
            else:
                part._copy_model_grads_to_main_grads()
                gradients += part._collect_main_grad_data_for_unscaling()
        return gradients

    def _skip(self) -> StepOutcome:
        source = self._overflow_source()
        settings = self.scaler.settings
        if self.scaler.skipped_in_a_row >= settings.max_skips:
            raise TooManySkips(
                f"{self.scaler.skipped_in_a_row} updates in a row overflowed; the loss scale is now "
                f"{self.scaler.scale.item():g} (minimum {settings.minimum:g}); last seen in {source}"
            )
        return StepOutcome(False, overflow_source=source)

    def _overflow_source(self) -> str:
        """Where gradients are not finite: rank, stage, kind and name. Collective over the world."""
        bad = [
            piece
            for chunk in self.model.pieces
            for piece in chunk
            if not torch.isfinite(piece.parameter.main_grad).all()
        ]
        mine = None
        if bad:
            stage = self.model.world.pipeline.rank
            mine = f"stage {stage}: {bad[0].kind} {bad[0].name}"
            mine += f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        everywhere: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        found = [f"rank {rank}, {text}" for rank, text in enumerate(everywhere) if text]
        return "; ".join(found) or "unknown"
