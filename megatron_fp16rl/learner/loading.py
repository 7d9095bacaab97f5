"""Loads the weights of a Hugging Face folder: each rank reads the slices that its own shards are made of."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_fp16rl.learner.lora import initial
from megatron_fp16rl.learner.model import Model, Shard, largest_magnitude
from megatron_fp16rl.models.folder import HFFolder, is_spare
from megatron_fp16rl.models.layouts import Replicated
from megatron_fp16rl.models.parts import by_name
from megatron_fp16rl.models.source import WeightsError

# A slice that was read: file and name of its tensor, its largest magnitude, and the dtype it was cast to.
_Slice = tuple[str, torch.Tensor, torch.dtype]


@torch.no_grad()
def load(model: Model, folder: HFFolder) -> None:
    """Fills this rank's shards from a folder, and re-initialises adapters.

    Collective over the world. Raises WeightsError, on all ranks, for tensors that are missing, left over,
    of another shape, not finite, or out of range for the model's dtype. Every number is read, and looked
    at, by the ranks that hold it.
    """
    world, fault = model.world, None
    shards = [*model.weights, *model.buffers]
    try:
        if model.spec.tied:
            folder.check_tied(world.rank, world.size)
        _check_ranges([each for shard in shards for each in _fill(model, shard, folder)])
    except WeightsError as error:  # of this rank's slices: the others would wait for it
        fault = str(error)
    used = {name for shard in shards for name in model.rule(shard.name).hf}
    reports = world.gather((fault, used))
    for of_rank, _ in reports:
        if of_rank is not None:
            raise WeightsError(of_rank)
    # A tensor that no rank took is one that the model would silently be without.
    used = set().union(*(names for _, names in reports))
    about = (model.config.num_layers, model.spec.mtp_layers, model.spec.tied)
    left = [n for n in folder.names() if n not in used and not is_spare(n, *about)]
    if left:
        raise WeightsError(f"{folder.path}: no parameter of the model takes {', '.join(left[:5])}")
    if lora := model.lora:
        model.set_adapters(lambda name, shape: initial(name, shape, lora.seed))


def _fill(model: Model, shard: Shard, folder: HFFolder) -> Iterator[_Slice]:
    """Reads one slice of each tensor that a shard is made of, and copies its parts to their places."""
    layout, parameter = model.rule(shard.name).layout, shard.parameter
    rank = 0 if isinstance(layout, Replicated) else model.tensor_axis(shard).rank
    parts = by_name(model.hf_parts(shard, rank))
    if sum(part.numel for each in parts.values() for part in each) < parameter.numel():
        parameter.zero_()  # rows that fill up the vocabulary
    # A tied copy has the embedding's tensor, under the embedding's name.
    shapes = dict(model.hf_tensors(replace(shard, name=model.canonical_name(shard.name))))
    for name in model.rule(shard.name).hf:
        actual, expected = folder.entry(name).shape, shapes[name]
        if actual != expected:
            raise WeightsError(
                f"{folder.where(name)} is {list(actual)}, but its config.json asks for {list(expected)}: one of "
                "the two is of another model"
            )
        if name not in parts:  # a rank of padding alone
            continue
        first = tuple(map(min, *(part.start for part in parts[name]), parts[name][0].start))
        last = tuple(map(max, *(part.end for part in parts[name]), parts[name][0].end))
        # The range is looked at where the numbers are needed: on the device, before they are cast.
        numbers = folder.read_box(name, first, last).to(parameter.device)
        yield folder.where(name), largest_magnitude(numbers), parameter.dtype
        for part in parts[name]:
            box = (slice(a - b, c - b) for a, b, c in zip(part.start, first, part.end, strict=True))
            part.view(parameter).copy_(numbers[tuple(box)])


def _check_ranges(slices: list[_Slice]) -> None:
    """All at once: each by itself would wait for the device."""
    if not slices:
        return
    found = torch.stack([largest for _, largest, _ in slices]).tolist()
    for (where, _, dtype), largest in zip(slices, found, strict=True):
        limit = torch.finfo(dtype).max
        if not math.isfinite(largest):
            raise WeightsError(
                f"{where} holds {'NaN' if math.isnan(largest) else 'an infinity'}: the file is damaged, or what "
                "trained it diverged. Fetch or save the model again"
            )
        if largest > limit:
            raise WeightsError(
                f"{where} reaches {largest:g}, which {dtype} (largest number {limit:g}) cannot hold: take "
                "bf16 (precision: bf16)"
            )
