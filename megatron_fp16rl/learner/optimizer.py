"""Megatron's optimizers, stepped together under one loss scaler."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_fp16rl import platform
from megatron_fp16rl.learner.loss_scale import LossScaler, underflow_fraction
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.learner.nonfinite import NonFiniteGradient, TooManySkips
from megatron_fp16rl.recipe import Optimizer as Settings

STATE_NAMES = ("fp32_param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Slot:
    """Where a parameter's state is kept: the Adam, its group, the fp32 it updates, the elements."""

    adam: torch.optim.Optimizer
    group: dict[str, Any]
    main: torch.Tensor
    span: slice


@dataclass(frozen=True)
class ParameterState:
    """What this rank's optimizer holds of one parameter: a range of its elements, flattened.

    tensors   fp32_param (what Adam updates), exp_avg and exp_avg_sq, each fp32 [span]; they are the
              optimizer's own: writing to them restores it
    step      Adam's count of updates, from which its bias correction follows
    """

    span: slice
    tensors: dict[str, torch.Tensor]
    step: int


@dataclass(frozen=True)
class UpdateOutcome:
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
            fp16=model.dtype is torch.float16,
            bf16=model.dtype is torch.bfloat16,
            params_dtype=model.dtype,
            use_distributed_optimizer=model.distributed_optimizer,
            **settings.megatron,
        )
        self.megatron = get_megatron_optimizer(
            config, model.chunks, config_overrides=get_standard_config_overrides(config)
        )
        assert isinstance(self.megatron, ChainedOptimizer)
        for part in self.parts:
            platform.current().tune_optimizer(part)
            if scaler:
                part.grad_scaler = scaler  # one scaler, in place of Megatron's own for each part
        self._slots = self._find_slots()
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
    def parts(self) -> list[Any]:
        """Megatron's optimizers: one for dense parameters, one for experts."""
        return self.megatron.chained_optimizers

    def state_of(self, parameter: torch.Tensor) -> ParameterState:
        """This rank's state of a parameter: zeros if there was no update yet.

        The range is empty where the distributed optimizer gave the parameter to other ranks.
        """
        slot = self._slots.get(id(parameter))
        if slot is None:
            empty = torch.empty(0, device=parameter.device)
            return ParameterState(slice(0, 0), dict.fromkeys(STATE_NAMES, empty), 0)
        adam = slot.adam.state[slot.main]
        if "exp_avg" not in adam:
            adam.update({name: torch.zeros_like(slot.main) for name in ("exp_avg", "exp_avg_sq")})
            if isinstance(
                slot.adam, torch.optim.Adam
            ):  # it takes a state that is not empty for complete
                adam["step"] = torch.tensor(0.0)
        values = (slot.main.detach(), adam["exp_avg"], adam["exp_avg_sq"])
        tensors = {n: v.view(-1) for n, v in zip(STATE_NAMES, values, strict=True)}
        return ParameterState(slot.span, tensors, int(adam.get("step", slot.group.get("step", 0))))

    def restore_step(self, parameter: torch.Tensor, step: int) -> None:
        """Sets Adam's count of updates of a parameter.

        torch keeps one for each parameter, Apex and Transformer Engine keep one for a group.
        """
        slot = self._slots.get(id(parameter))
        if slot is None:
            return
        if isinstance(slot.adam, torch.optim.Adam):
            # A tensor of its own, because Adam adds to it in place. Megatron-core 0.19.2 gives all
            # parameters the same one: resumed, each update would count as many as there are.
            slot.adam.state[slot.main]["step"] = torch.tensor(float(step), device=slot.main.device)
        else:
            slot.group["step"] = step

    def _find_slots(self) -> dict[int, _Slot]:
        """The slot of each parameter of this rank, by the parameter's id."""
        slots: dict[int, _Slot] = {}
        for part in self.parts:
            if part.is_stub_optimizer:
                continue
            group_of = {id(p): g for g in part.optimizer.param_groups for p in g["params"]}
            for shard in self.model.trained:
                parameter = shard.parameter
                main = getattr(parameter, "main_param", parameter)
                span = slice(0, parameter.numel())
                if isinstance(part, DistributedOptimizer):
                    # It keeps a range of a parameter's elements, or none of them.
                    if parameter not in part.model_param_group_index_map:
                        continue
                    group, index = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][index]
                    owned = part._get_model_param_range_map(parameter)["param"]
                    span = slice(owned.start, owned.end)
                if id(main) in group_of:
                    slots[id(parameter)] = _Slot(part.optimizer, group_of[id(main)], main, span)
        return slots

    def zero_grad(self) -> None:
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self) -> UpdateOutcome:
        """Unscales once, checks, clips, steps; or skips, on every rank alike.

        Raises TooManySkips, or without a loss scale NonFiniteGradient.

        Upstream, each part unscales and updates a scaler of its own (ChainedOptimizer.prepare_grads
        of megatron-core 0.19.2), and found_inf is reduced over part of the world only.
        """
        # 1. Gradients of all parts in fp32: what is unscaled, clipped and learnt is one set of tensors.
        gradients = self._main_gradients()
        # 2. fp16: measure, then unscale once. An inf anywhere in the world skips the update on every
        #    rank, or the replicas would drift apart. A good update counts towards a higher scale.
        underflow = None
        if self.scaler is not None:
            underflow = self._underflow_fraction(self.scaler)
            if self.scaler.unscale(gradients):
                return self._skip(self.scaler)
            self.scaler.update(found_inf=False)
        # 3. Clip by the norm over all ranks and parts: one large expert must not be clipped alone. With
        #    a scaler the norm is finite here; without one nothing has looked at the gradients yet.
        norm = float(self.megatron.get_grad_norm())
        if not norm < float("inf"):  # also true of nan
            raise NonFiniteGradient(
                f"gradient norm is {norm}; first non-finite gradient: {self._overflow_source()}"
            )
        coefficient = self.settings.clip_grad / (norm + 1e-6)
        if coefficient < 1.0 and gradients:
            torch._foreach_mul_(gradients, coefficient)
        # 4. Step. The schedule advances only now, because skipped updates do not count; and before
        #    Adam, which takes this update's learning rate from it.
        self.schedule.step(increment=1)
        for part in self.parts:
            part.step_with_ready_grads()
        return UpdateOutcome(True, norm, self.schedule.get_lr({}), underflow_fraction=underflow)

    def _main_gradients(self) -> list[torch.Tensor]:
        """This rank's fp32 gradients, in the tensors where the optimizers will read them."""
        gradients: list[torch.Tensor] = []
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

    def _underflow_fraction(self, scaler: LossScaler) -> float:
        """Of the scaled gradients. Embeddings are left out: most of their rows had no token."""
        gradients: list[torch.Tensor] = []
        may_be_idle: list[torch.Tensor] = []
        for shard in self.model.trained:
            slot = self._slots.get(id(shard.parameter))
            if shard.kind == "embedding" or slot is None or slot.main.grad is None:
                continue
            # An expert may have had no token; of an adapter's two matrices one begins as zero,
            # and until it is not, the other has no gradient.
            (gradients if shard.kind == "dense" else may_be_idle).append(slot.main.grad)
        return underflow_fraction(gradients, may_be_idle, scaler.scale.device)

    def _skip(self, scaler: LossScaler) -> UpdateOutcome:
        source, settings = self._overflow_source(), scaler.settings
        was_lowest = scaler.scale.item() <= settings.minimum
        scaler.update(found_inf=True)
        if was_lowest or scaler.skipped_in_a_row >= settings.max_skips:
            times = f"{scaler.skipped_in_a_row} updates in a row overflowed"
            raise TooManySkips(
                f"{'an update overflowed at the minimum' if was_lowest else times}; the loss scale is now "
                f"{scaler.scale.item():g} (minimum {settings.minimum:g}); last seen in {source}"
            )
        return UpdateOutcome(False, overflow_source=source)

    def _overflow_source(self) -> str:
        """Where gradients are not finite: rank, stage, kind and name. Collective over the world."""
        world = self.model.world
        bad = [s for s in self.model.trained if not torch.isfinite(s.main_grad).all()]
        local = None
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            stage = world.pipeline.rank
            local = f"rank {world.rank}, stage {stage}: {bad[0].kind} {bad[0].name}{more}"
        return "; ".join(filter(None, world.gather(local))) or "unknown"
