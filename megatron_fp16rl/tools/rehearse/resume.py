"""Whether a killed run went on where it stood.

Counters and loss scale must continue those of the checkpoint. The resumed step makes one update: its
gradient follows from Adam's first moment before and after, and with that gradient the second moment and the
weights must follow. A moment that began at zero, or a weight that was imported again, does not.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_fp16rl.learner.checkpoint_files import Checkpoint
from megatron_fp16rl.recipe import LossScale, Optimizer, Recipe
from megatron_fp16rl.tools.rehearse.checks import Failed, checkpoint_at, read_steps
from megatron_fp16rl.utils.files import read_json

_WEIGHT = "optimizer.state.fp32_param."
_ROUNDING = 1e-3  # relative; fp32 moments, and a gradient that is a difference of two of them
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # fp32_param, exp_avg, exp_avg_sq


def resumed(run: Path, step: int, recipe: Recipe) -> str:
    """Compares the checkpoint after `step` with the one before it. Raises Failed."""
    rows = read_steps(run)
    if (numbers := [row["step"] for row in rows]) != list(range(step + 1)):
        raise Failed(f"{run} has the steps {numbers}, not 0 to {step} once each")
    if not rows[-1]["updates"]:
        raise Failed(
            "the resumed step's update was skipped for an overflow, so it shows nothing; rehearse with a "
            "lower precision.loss_scale.initial"
        )
    before, after = checkpoint_at(run, step), checkpoint_at(run, step + 1)
    old, new = (read_json(checkpoint.path / "state.json") for checkpoint in (before, after))
    updates, tokens = (sum(row[key] for row in rows) for key in ("updates", "tokens/step"))
    counts = {new["schedule"]["updates"], *new["adam_steps"].values()}
    if counts != {updates} or new["progress"]["tokens"] != tokens:
        raise Failed(
            f"{step + 1} steps made {updates} updates of {tokens} tokens; the checkpoint has {counts} and "
            f"{new['progress']['tokens']}"
        )
    line = f"updates {old['schedule']['updates']} -> {updates}"
    if old["scaler"] is not None:
        if (expected := scaler_after(old["scaler"], recipe.precision.loss_scale)) != new["scaler"]:
            raise Failed(
                f"the loss scale after the resumed step is {new['scaler']}, not {expected}"
            )
        line += f", loss scale {old['scaler']['scale']:g} -> {new['scaler']['scale']:g}"
    count = _check_tensors(before, after, updates, rows[-1]["lr"], recipe.learner.optimizer)
    return f"{line}; {count:,} weights and their Adam moments follow from the checkpoint's"


def scaler_after(state: dict[str, Any], settings: LossScale) -> dict[str, Any]:
    """A loss scaler's state after one more update without overflow."""
    state = {**state, "skipped_in_a_row": 0, "growth_tracker": state["growth_tracker"] + 1}
    if state["growth_tracker"] == settings.window:
        state |= {"scale": 2 * state["scale"], "growth_tracker": 0}
        state["hysteresis_left"] = settings.hysteresis
    return state


def _check_tensors(
    before: Checkpoint, after: Checkpoint, update: int, lr: float, settings: Optimizer
) -> int:
    """Compares all trained parameters; returns their number of elements."""
    old, new = _read_tensors(before), _read_tensors(after)
    names = [name.removeprefix(_WEIGHT) for name in new if name.startswith(_WEIGHT)]
    if not names or old.keys() != new.keys():
        raise Failed(f"{before.path} and {after.path} do not hold the optimizer state of one model")
    for name in names:
        if fault := adam_fault(_state(old, name), _state(new, name), update, lr, settings):
            raise Failed(f"the optimizer did not go on where it stood: {fault} of {name}")
        if not torch.equal(new[name], _state(new, name)[0].to(new[name].dtype)):
            raise Failed(f"{after.path}: {name} is not the optimizer's fp32 weight, rounded")
    return sum(new[name].numel() for name in names)


def _state(tensors: dict[str, torch.Tensor], name: str) -> State:
    weight, mean, square = (
        tensors[f"optimizer.state.{part}.{name}"]
        for part in ("fp32_param", "exp_avg", "exp_avg_sq")
    )
    return weight, mean, square


def adam_fault(old: State, new: State, update: int, lr: float, settings: Optimizer) -> str | None:
    """Which part of a parameter's new state does not follow from the old one by Adam; None if all does.

    update: number of the update between them, from 1. Kingma and Ba (arXiv 1412.6980), algorithm 1,
    with decoupled weight decay (arXiv 1711.05101).
    """
    weight, mean, square = (tensor.double() for tensor in old)
    new_weight, new_mean, new_square = (tensor.double() for tensor in new)
    beta1, beta2 = settings.beta1, settings.beta2
    gradient = (new_mean - beta1 * mean) / (1 - beta1)
    if _differs(beta2 * square + (1 - beta2) * gradient**2, new_square, new_square):
        return "exp_avg and exp_avg_sq"
    root = (new_square / (1 - beta2**update)).sqrt() + settings.eps
    moved = weight - lr * new_mean / (1 - beta1**update) / root
    # Norms and biases do not decay.
    decays = (0.0, lr * settings.weight_decay)
    if all(_differs(moved - decay * weight, new_weight, new_weight - weight) for decay in decays):
        return "the weights"
    return None


def _differs(expected: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> bool:
    # 1e-7: weights are fp32, and a parameter without a gradient does not move.
    allowed = _ROUNDING * scale.norm() + 1e-7 * value.norm()
    return bool((expected - value).norm() > allowed)


def _read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a Megatron-core checkpoint, by its own names; read by torch alone."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint.path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # others are pickled objects
    }
    with warnings.catch_warnings():  # about the process group, which is not there on purpose
        warnings.simplefilter("ignore", UserWarning)
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
