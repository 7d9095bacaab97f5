"""Whether a run went on where it stood: a step's checkpoint held against the one before it.

The rules of the loss scale and of Adam are written down here again, and tensors are read by torch
alone: what is checked has no part in the check.
"""

import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from megatron_fp16rl.learner.checkpoint_files import Checkpoint
from megatron_fp16rl.recipe import LossScale, Optimizer, Recipe
from megatron_fp16rl.tools.rehearse.checks import Failed, checkpoint, state_of, steps

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = ("fp32_param", *_MOMENTS)
_ROUNDING = 2.0**-22  # of fp32, a few operations
_SMALLEST = 1e-37  # below, squares lose digits in fp32, or are flushed to zero


def resumed(run: Path, before: int, recipe: Recipe) -> str:
    """Holds the checkpoint after step `before` against the one it began with; says what went on.

    Raises Failed where counters, loss scale, weights or Adam's moments are not what the step's updates
    make of them, and where the step made no update, of which nothing could be seen.
    """
    rows = steps(run, before + 1)
    found = [checkpoint(run, step) for step in (before, before + 1)]
    old, new = map(state_of, found)
    made = rows[-1]["updates"]
    _check_counters(old, new, rows)
    said = f"updates {old['schedule']['updates']} -> {new['schedule']['updates']}"
    if new["scaler"] is not None:
        said += _check_scalers(old, new, rows, recipe)
    if not made:
        raise Failed(
            "not proved that the run went on: every update of the resumed step was skipped for an "
            "overflow; rehearse it with a lower precision.loss_scale.initial"
        )
    count = _check_tensors(*found, rows[-1], old["schedule"]["updates"], recipe.learner.optimizer)
    how = "what one update makes" if made == 1 else f"within what {made} updates can make"
    return f"{said}; {count:,} weights and their moments are {how} of the checkpoint's"


def _check_counters(old: dict, new: dict, rows: list[dict]) -> None:
    """Schedule, every parameter's Adam step and the count of tokens, in both checkpoints."""
    if not old["adam_steps"] or old["adam_steps"].keys() != new["adam_steps"].keys():
        raise Failed("the two checkpoints do not count Adam's steps of the same parameters")
    for state, past in ((old, rows[:-1]), (new, rows)):
        made = sum(row["updates"] for row in past)
        counts = {"the schedule": state["schedule"]["updates"], **state["adam_steps"]}
        if wrong := {name: count for name, count in counts.items() if count != made}:
            raise Failed(
                f"{len(past)} steps made {made} updates; their checkpoint counts {_some(wrong)}"
            )
        tokens = sum(row["tokens/step"] for row in past)
        if state["progress"]["tokens"] != tokens:
            raise Failed(
                f"{len(past)} steps had {tokens} tokens, not {state['progress']['tokens']}"
            )


# The loss scale


@dataclass(frozen=True)
class Scaler:
    """A loss scale and its counters, as in a checkpoint's state.json."""

    scale: float
    growth_tracker: int
    hysteresis_left: int
    skipped_total: int
    skipped_in_a_row: int

    def good(self, rule: LossScale) -> "Scaler":
        """After an update without overflow: the scale doubles after `window` of them."""
        counted = replace(self, skipped_in_a_row=0, growth_tracker=self.growth_tracker + 1)
        if counted.growth_tracker < rule.window:
            return counted
        return replace(
            counted, scale=2 * self.scale, growth_tracker=0, hysteresis_left=rule.hysteresis
        )

    def overflow(self, rule: LossScale) -> "Scaler":
        """After a skipped update: the scale halves once `hysteresis` of them are used up."""
        left = self.hysteresis_left - 1
        scale = max(self.scale / 2, rule.minimum) if left <= 0 else self.scale
        return Scaler(scale, 0, left, self.skipped_total + 1, self.skipped_in_a_row + 1)


def scalers_after(start: Scaler, good: int, overflows: int, rule: LossScale) -> set[Scaler]:
    """What so many good updates and overflows can make of a scaler, in whichever order: one, if there
    are only good ones or only overflows. Metrics tell how many there were, not their order."""
    reached = {(0, 0): {start}}
    for g in range(good + 1):
        for o in range(overflows + 1):
            if g or o:
                after_good = {s.good(rule) for s in reached.get((g - 1, o), ())}
                after_overflow = {s.overflow(rule) for s in reached.get((g, o - 1), ())}
                reached[g, o] = after_good | after_overflow
    return reached[good, overflows]


def _check_scalers(old: dict, new: dict, rows: list[dict], recipe: Recipe) -> str:
    """The resumed step from the checkpoint on, then all steps from a fresh scaler on."""
    rule, before = recipe.precision.loss_scale, Scaler(**old["scaler"])
    after, step = Scaler(**new["scaler"]), rows[-1]["step"]
    if after not in (allowed := _step(before, rows[-1], recipe)):
        raise Failed(
            f"the loss scale did not go on where it stood: {_told(before)} at the checkpoint and "
            f"{_events(rows[-1], recipe)} make {_some(list(map(_told, allowed)))}; after step {step} it "
            f"is {_told(after)}"
        )
    reached = {Scaler(rule.initial, 0, rule.hysteresis, 0, 0)}
    for row in rows[:-1]:
        reached = {later for start in reached for later in _step(start, row, recipe)}
    if before not in reached:
        raise Failed(
            f"the loss scale before the checkpoint, {_told(before)}, is not what its rule makes of "
            f"{rule.initial:g}: {_some(list(map(_told, reached)))}"
        )
    return f", loss scale {before.scale:.10g} -> {after.scale:.10g} with all its counters"


def _step(start: Scaler, row: dict, recipe: Recipe) -> set[Scaler]:
    """What a step can make of a scaler."""
    good, overflows = _counts(row, recipe)
    return scalers_after(start, good, overflows, recipe.precision.loss_scale)


def _counts(row: dict, recipe: Recipe) -> tuple[int, int]:
    """Good updates and overflows of a step. Only the first are read from its metrics."""
    rollout = recipe.rollout
    all_of_them = rollout.prompts * rollout.samples // recipe.learner.global_batch_size
    if not 0 <= row["updates"] <= all_of_them:
        raise Failed(f"step {row['step']} says {row['updates']} updates of {all_of_them}")
    return row["updates"], all_of_them - row["updates"]


def _events(row: dict, recipe: Recipe) -> str:
    good, overflows = _counts(row, recipe)
    return f"{good} good update(s) with {overflows} overflow(s)"


def _told(scaler: Scaler) -> str:
    return "{:.10g} (growth_tracker {}, hysteresis_left {}, skipped {}, in a row {})".format(
        *astuple(scaler)
    )


# Weights and moments


def read_tensors(found: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a Megatron-core checkpoint, by its own names."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(found.path)
    kept = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in kept.items()
        if hasattr(about, "properties")  # not a pickled object
    }
    with warnings.catch_warnings():  # that there is no process group: none is meant
        warnings.simplefilter("ignore", UserWarning)
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _check_tensors(
    before: Checkpoint, after: Checkpoint, row: dict, first: int, settings: Optimizer
) -> int:
    """Every trained parameter of two checkpoints; returns the number of their elements."""
    old, new = read_tensors(before), read_tensors(after)
    if old.keys() != new.keys():
        raise Failed(f"{after.path} has other tensors: {_some(sorted(old.keys() ^ new.keys()))}")
    prefix = "optimizer.state.fp32_param."
    names = [name.removeprefix(prefix) for name in new if name.startswith(prefix)]
    if not names:
        raise Failed(f"{after.path} has no state of an optimizer")
    lr = row["lr"] if row["updates"] == 1 else settings.lr  # none of several was higher
    count, square = 0, 0.0
    for name in names:
        for place, tensors in ((before, old), (after, new)):
            if not torch.equal(tensors[name], tensors[prefix + name].to(tensors[name].dtype)):
                raise Failed(f"{place.path}: {name} is not the optimizer's fp32_param, rounded")
        pair = [[tensors[f"optimizer.state.{n}.{name}"] for n in _STATE] for tensors in (old, new)]
        if fault := adam_fault(*pair, row["updates"], first, lr, settings):
            raise Failed(f"the optimizer did not go on where it stood: {name}: {fault}")
        count += new[name].numel()
        gradient = (pair[1][1].double() - settings.beta1 * pair[0][1].double()) / (
            1 - settings.beta1
        )
        square += float(gradient.square().sum())
    if row["updates"] == 1:
        _check_norm(square**0.5, row["grad/norm"], settings.clip_grad)
    return count


def _check_norm(found: float, norm: float, clip: float) -> None:
    """The gradient that the moments tell of is the one that the step's metrics tell of."""
    expected = min(norm, clip)
    if abs(found - expected) > 1e-3 * expected + 1e-5 * clip:  # of no gradient, rounding is left
        raise Failed(
            f"Adam's moments took in a gradient of norm {found:.4g}; the resumed step's was "
            f"{expected:.4g} when clipped"
        )


def adam_fault(
    old: list[torch.Tensor],
    new: list[torch.Tensor],
    updates: int,
    first: int,
    lr: float,
    settings: Optimizer,
) -> str | None:
    """What shows that `updates` steps of Adam did not make `new` of `old`, if something does.

    old, new: fp32_param, exp_avg and exp_avg_sq of one parameter, fp32; first: Adam's steps before;
    lr: of a single update, or the highest of several.

    With m, v the moments, g_j the unknown gradient of update j of k, elementwise and by Cauchy-Schwarz
      (m_k - b1^k m_0)^2 <= c_k (v_k - b2^k v_0),  c_k = (1-b1)^2/(1-b2) sum_{j<k} (b1^2/b2)^j
    which is an equation for k = 1: both sides are c_1 (1-b2) g^2. Then the new weights are known, too.
    """
    values = [[tensor.double() for tensor in state] for state in (old, new)]
    (weight, mean, square), (new_weight, new_mean, new_square) = values
    beta1, beta2 = settings.beta1, max(settings.beta2, 1e-12)
    kept, c = beta2**updates, _bound(beta1, beta2, updates)
    there = (new_mean - beta1**updates * mean).square()
    most = c * (new_square - kept * square)
    # Rounding, as m and v were stored: relative to the largest that they can have been on the way.
    in_mean = updates * _ROUNDING * (mean.abs() + (c * new_square / kept).sqrt())
    in_square = updates * (_ROUNDING * (square + new_square / kept) + _SMALLEST)
    slack = 2 * there.sqrt() * in_mean + in_mean.square() + c * in_square
    wrong = there > most + slack
    if updates == 1:
        wrong |= there < most - slack
    if wrong.any():
        return f"{_share(wrong)} of exp_avg and exp_avg_sq do not follow from those before the step"
    if updates == 1:
        wrong = _wrong_weights(values, first + 1, lr, settings)
    else:
        ratio = (mean.square() / square.clamp(min=_SMALLEST)) * (square > 0)
        far = sum(_furthest(ratio, first, beta1, beta2, updates)) * lr
        far += updates * lr * settings.weight_decay * (weight.abs() + far)
        wrong = (new_weight - weight).abs() > far * 1.001 + updates * _ROUNDING * weight.abs()
    if wrong.any():
        return f"{_share(wrong)} of the weights are not where {updates} update(s) can bring them"
    return None


def _bound(beta1: float, beta2: float, updates: int) -> float:
    """c_k of `adam_fault`."""
    return (1 - beta1) ** 2 / (1 - beta2) * sum((beta1**2 / beta2) ** j for j in range(updates))


def _furthest(
    ratio: torch.Tensor, first: int, beta1: float, beta2: float, updates: int
) -> Iterator[torch.Tensor]:
    """The most that each update moves a weight, over lr. ratio: m^2/v before them."""
    for update in range(1, updates + 1):
        step = first + update
        most = (beta1**2 / beta2) ** update * ratio + _bound(beta1, beta2, update)
        yield most.sqrt() * (1 - beta2**step) ** 0.5 / (1 - beta1**step)


def _wrong_weights(
    values: list[list[torch.Tensor]], step: int, lr: float, settings: Optimizer
) -> torch.Tensor:
    """Where the new weights are not Adam's, whether this parameter's weights decay or not."""
    (weight, _, _), (new_weight, mean, square) = values
    root = (square / (1 - settings.beta2**step)).sqrt() + settings.eps
    moved = lr * mean / (1 - settings.beta1**step) / root
    slack = _ROUNDING * weight.abs() + 1e-4 * moved.abs()
    apart = [
        (weight * (1 - lr * decay) - moved - new_weight).abs() > slack
        for decay in (0.0, settings.weight_decay)
    ]
    return min(apart, key=lambda wrong: int(wrong.sum()))


def _share(wrong: torch.Tensor) -> str:
    return f"{int(wrong.sum())} of {wrong.numel()} elements"


def _some(found: dict | list) -> str:
    """A few of what was found."""
    if isinstance(found, dict):
        return str(dict(list(found.items())[:3]))
    return " or ".join(map(str, found[:3])) + (" or others" if len(found) > 3 else "")
