"""Whether a killed run went on where it stood: its next step, calculated again from the checkpoint.

The resumed step makes one update. Its gradient follows from Adam's first moment before and after; with
that gradient, the rest of the new state must follow from the old. A moment that began at zero, or a
weight that was imported again, does not fit. Tensors are read by torch alone.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_fp16rl.learner.checkpoint_files import Checkpoint
from megatron_fp16rl.metrics.log import Row
from megatron_fp16rl.recipe import LossScale, Optimizer, Recipe
from megatron_fp16rl.tools.rehearse.checks import Failed, all_steps, checkpoint_at
from megatron_fp16rl.utils.files import read_json

_WEIGHT = "optimizer.state.fp32_param."
_ROUNDING = 1e-3  # relative; fp32 moments, and a gradient that is a difference of two of them
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # fp32_param, exp_avg, exp_avg_sq


def resumed(run: Path, step: int, recipe: Recipe) -> str:
    """Compares the checkpoint after `step` with the one before it. Raises Failed."""
    rows = all_steps(run, step + 1)
    if not rows[-1]["updates"]:
        raise Failed(
            "the resumed step's update was skipped for an overflow, so it shows nothing; rehearse with a "
            "lower precision.loss_scale.initial"
        )
    before, after = checkpoint_at(run, step), checkpoint_at(run, step + 1)
    old, new = (read_json(checkpoint.path / "state.json") for checkpoint in (before, after))
    _check_counters(old, rows[:-1])
    _check_counters(new, rows)
    line = f"updates {old['schedule']['updates']} -> {new['schedule']['updates']}"
    if old["scaler"] is not None:
        if (expected := scaler_after(old["scaler"], recipe.precision.loss_scale)) != new["scaler"]:
            raise Failed(
                f"the loss scale after the resumed step is {new['scaler']}, not {expected}"
            )
        line += f", loss scale {old['scaler']['scale']:g} -> {new['scaler']['scale']:g}"
    count = _check_tensors(before, after, rows[-1], old["schedule"]["updates"] + 1, recipe)
    return f"{line}; {count:,} weights and their Adam moments follow from the checkpoint's"


def _check_counters(state: dict[str, Any], rows: list[Row]) -> None:
    """The learning rate's schedule, Adam's steps of each parameter and the count of tokens."""
    updates, tokens = (sum(row[key] for row in rows) for key in ("updates", "tokens/step"))
    counts = {"the schedule": state["schedule"]["updates"], **state["adam_steps"]}
    if other := {name: count for name, count in counts.items() if count != updates}:
        name, count = next(iter(other.items()))
        raise Failed(
            f"{len(rows)} steps made {updates} updates; the checkpoint has {count} of {name}"
        )
    if state["progress"]["tokens"] != tokens:
        raise Failed(f"{len(rows)} steps had {tokens} tokens, not {state['progress']['tokens']}")


def scaler_after(state: dict[str, Any], settings: LossScale) -> dict[str, Any]:
    """A loss scaler's state after one more update without overflow."""
    state = {**state, "skipped_in_a_row": 0, "growth_tracker": state["growth_tracker"] + 1}
    if state["growth_tracker"] == settings.window:
        state |= {"scale": 2 * state["scale"], "growth_tracker": 0}
        state["hysteresis_left"] = settings.hysteresis
    return state


def _check_tensors(
    before: Checkpoint, after: Checkpoint, row: Row, update: int, recipe: Recipe
) -> int:
    """Compares all trained parameters; returns their number of elements."""
    old, new = read_tensors(before), read_tensors(after)
    names = [name.removeprefix(_WEIGHT) for name in new if name.startswith(_WEIGHT)]
    if not names or old.keys() != new.keys():
        raise Failed(f"{before.path} and {after.path} do not hold the optimizer state of one model")
    for name in names:
        keys = [
            f"optimizer.state.{part}.{name}" for part in ("fp32_param", "exp_avg", "exp_avg_sq")
        ]
        pair = (
            (old[keys[0]], old[keys[1]], old[keys[2]]),
            (new[keys[0]], new[keys[1]], new[keys[2]]),
        )
        if fault := adam_fault(*pair, update, row["lr"], recipe.learner.optimizer):
            raise Failed(f"the optimizer did not go on where it stood: {fault} of {name}")
        if not torch.equal(new[name], new[keys[0]].to(new[name].dtype)):
            raise Failed(f"{after.path}: {name} is not the optimizer's fp32 weight, rounded")
    return sum(new[name].numel() for name in names)


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


def read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a Megatron-core checkpoint, by its own names."""
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
