"""A large layout folded to few ranks: what was more than one stays more than one, while there is room."""

import math
from dataclasses import dataclass

from megatron_fp16rl.recipe import Layout

_FOLDED = 2
# The first are kept first. The last two are counted by the ranks that the others leave.
_AXES = (
    "tensor_parallel",
    "pipeline_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
    "data_parallel",
    "expert_data_parallel",
)


@dataclass(frozen=True)
class Fold:
    """One number of the recipe, as it is and as it is rehearsed."""

    what: str
    full: object
    here: object


def fold(layout: Layout, ranks: int) -> tuple[dict[str, object], list[Fold]]:
    """The layout on at most `ranks` ranks, each axis 1 or 2, no more ranks than its axes need.

    Axes that no longer fit become 1, those of experts and of data first. Experts are divided over
    ranks that are tensor- or data-parallel for the rest, as in Megatron. Returns values of Layout's
    fields, and what was folded.
    """
    full = {axis: _size(layout, axis) for axis in _AXES}
    here = dict.fromkeys(_AXES, 1)
    for axis in (axis for axis in _AXES if full[axis] > 1):
        wider = {**here, axis: _FOLDED}
        if _ranks(wider) <= ranks:
            here = wider
    world = _ranks(here)
    here["data_parallel"] = world // (here["tensor_parallel"] * here["pipeline_parallel"])
    pipelines = here["pipeline_parallel"] > 1
    values = {
        "ranks": world,
        **{axis: here[axis] for axis in _AXES[:4]},
        "sequence_parallel": layout.sequence_parallel and here["tensor_parallel"] > 1,
        "model_chunks": min(layout.model_chunks, _FOLDED) if pipelines else 1,
    }
    names = ("ranks", *_AXES[:5], "model_chunks", "sequence_parallel")
    before = {**layout.model_dump(), **full}
    after = {**here, **values}
    return values, [Fold(n, before[n], after[n]) for n in names if before[n] != after[n]]


def _size(layout: Layout, axis: str) -> int:
    if axis == "expert_data_parallel":
        experts = layout.expert_parallel * layout.expert_tensor_parallel
        has_experts = experts > 1  # otherwise it says no more than data_parallel
        return layout.ranks // (experts * layout.pipeline_parallel) if has_experts else 1
    return getattr(layout, axis)


def _ranks(sizes: dict[str, int]) -> int:
    """The fewest ranks with these sizes of axes."""
    dense = sizes["tensor_parallel"] * sizes["pipeline_parallel"]
    sparse = sizes["expert_parallel"] * sizes["expert_tensor_parallel"] * sizes["pipeline_parallel"]
    unit = world = math.lcm(dense, sparse)
    while (
        world // dense < sizes["data_parallel"] or world // sparse < sizes["expert_data_parallel"]
    ):
        world += unit
    return world
