"""Dynamic loss scaling: one scaler for all optimizers of a model, one decision for all ranks.

Gradients of RL are small; in fp16 anything below 6e-8 is zero. The loss is multiplied by a power of
two before backward, the fp32 gradients are divided by it afterwards. An overflow is a normal event:
the update is skipped everywhere and the scale is halved.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_fp16rl.recipe import LossScale

_SMALLEST_FP16 = 2.0**-24
_COUNTERS = ("growth_tracker", "hysteresis_left", "skipped_total", "skipped_in_a_row")


class LossScaler:
    """The scale and its counters, equal on every rank because every decision is reduced over all.

    growth_tracker    good updates since the last overflow, or the last doubling
    hysteresis_left   overflows until the scale is halved, the halving one included. A doubling refills it:
                      until then every further overflow halves the scale
    """

    def __init__(self, settings: LossScale, device: torch.device) -> None:
        self.settings = settings
        self.scale = torch.tensor([settings.initial], dtype=torch.float32, device=device)
        self.growth_tracker = 0
        self.hysteresis_left = settings.hysteresis
        self.skipped_total = 0
        self.skipped_in_a_row = 0

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Megatron's `grad_scale_func`: without it Megatron applies no scale at all."""
        return loss * self.scale

    @torch.no_grad()
    def unscale(self, gradients: list[torch.Tensor]) -> bool:
        """Divides fp32 gradients by the scale, in place. Returns whether any rank of the world has inf or nan.

        If one has, Optimizer.step skips the update, on every rank. Call it exactly once per update, on every rank, with all its gradients.
        """
        found_inf = torch.zeros(1, dtype=torch.float32, device=self.scale.device)
        if gradients:
            inverse = self.scale.double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse)
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        return bool(found_inf.item())

    def update(self, found_inf: bool) -> None:
        """Counts an update, and moves the scale: halved after overflows, doubled after a window."""
        if found_inf:
            self.skipped_total += 1
            self.skipped_in_a_row += 1
            self.growth_tracker = 0
            self.hysteresis_left -= 1
            if self.hysteresis_left <= 0:
                self.scale = (self.scale / 2).clamp(min=self.settings.minimum)
            return
        self.skipped_in_a_row = 0
        self.growth_tracker += 1
        if self.growth_tracker == self.settings.window:
            self.growth_tracker = 0
            self.hysteresis_left = self.settings.hysteresis
            self.scale = self.scale * 2

    def state_dict(self) -> dict[str, float | int]:
        """Everything but the settings, in plain numbers."""
        return {"scale": self.scale.item(), **{name: getattr(self, name) for name in _COUNTERS}}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.scale.fill_(state["scale"])
        for name in _COUNTERS:
            setattr(self, name, state[name])


@torch.no_grad()
def underflow_fraction(
    gradients: Iterable[torch.Tensor], may_be_idle: Iterable[torch.Tensor], device: torch.device
) -> float:
    """The share of gradients that underflow in fp16: exact zeros, and what it rounds to zero.

    gradients: scaled, fp32. What backward in fp16 has lost arrives here as zero. may_be_idle: gradients
    of experts or LoRA matrices that may be unused; skipped when all-zero. If every gradient is zero,
    the share is 1.

    Collective over the world; replicas count as often as they exist. Takes the memory of one gradient.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    lost, in_use, total = counts  # views: summed in place, reduced together
    for optional, tensors in ((False, gradients), (True, may_be_idle)):
        for gradient in tensors:
            is_used = gradient.any() if optional else 1
            lost += is_used * gradient.abs().le(_SMALLEST_FP16 / 2).count_nonzero()
            in_use += is_used * gradient.numel()
            total += gradient.numel()
    dist.all_reduce(counts)
    n_lost, n_in_use, n_total = counts.tolist()
    return n_lost / n_in_use if n_in_use else float(n_total > 0)
