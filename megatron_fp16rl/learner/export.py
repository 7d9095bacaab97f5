"""A model's weights on their way out: each rank's parts, or full Hugging Face tensors on rank 0.

`Export.parts` and `tensor` send nothing; `gather` is for those who need full tensors in one place:
folders, and transports that start from one rank.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors

from megatron_fp16rl.learner.model import Model, Shard, Shards, is_expert, largest_magnitude
from megatron_fp16rl.models.families.family import Rule
from megatron_fp16rl.models.parts import Part, address
from megatron_fp16rl.parallel import Axis
from megatron_fp16rl.utils.errors import FinalError

# The value of a parameter shard that is exported: itself, its gradient, ... of the shard's shape
Value = Callable[[torch.Tensor], torch.Tensor]
_SMALL_BYTES = 1 << 18  # of shards that are looked at together
MESSAGE_BYTES = 256 << 20  # of full tensors that are gathered at a time, unless one is larger


class WeightRangeError(FinalError):
    """A weight of the learner is not finite, or beyond what servers can hold."""


class Export:
    """The weights of a model, for servers of a dtype (default: the model's).

    Adapters are merged into the weights, one at a time: who gets these need not know of adapters.
    Buffers stay fp32, and come first.
    """

    def __init__(self, model: Model, served: torch.dtype | None = None) -> None:
        self.model, self.served = model, served or model.dtype
        self._last = "", torch.empty(0)

    @functools.cached_property
    def parts(self) -> list[Part]:
        """What this rank offers of the Hugging Face tensors; all ranks together offer each number once.

        Replicas share: each offers about the same number of bytes. A part's key is a shard's name.
        """
        model, found = self.model, []
        loads = {kind: [0] * axis.size for kind, axis in self._replicas.items()}
        for shard in itertools.chain(model.buffers, model.weights):
            load = loads[shard.is_expert]
            owner = load.index(min(load))  # the same on every replica: all have the same shards
            if model.is_tied_copy(shard.name):
                continue  # the first stage offers the embedding
            load[owner] += shard.parameter.nbytes
            if owner == self._replicas[shard.is_expert].rank:
                found += model.hf_parts(shard, model.tensor_axis(shard).rank)
        return found

    @functools.cached_property
    def _replicas(self) -> dict[bool, Axis]:
        return {True: self.model.world.expert_data, False: self.model.world.data_context}

    @functools.cached_property
    def _shards(self) -> dict[str, Shard]:
        return {
            shard.name: shard for shard in itertools.chain(self.model.buffers, self.model.weights)
        }

    def tensor(self, key: str) -> torch.Tensor:
        """A shard of this rank as it is sent."""
        # Once a shard, of which several parts are sent: a merge takes time.
        if key != self._last[0]:
            self._last = key, _merged(self.model, self._shards[key].parameter)
        return self._last[1]

    @property
    def memory(self) -> object:
        """Says where the shards lie; None if adapters are merged into any."""
        if self.model.adapter_of:
            return None
        return address(shard.parameter for shard in self._shards.values())

    def check(self, limit: int = MESSAGE_BYTES // 16) -> None:
        """Raises WeightRangeError, on all ranks, for weights that servers cannot hold. Collective.

        First of all: a server that has taken half of the tensors cannot go back to the last version.
        """
        self._last = "", torch.empty(0)  # of older weights
        _check_range(self.model, self.served, limit)

    def whole(self, limit: int = MESSAGE_BYTES) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Hugging Face name, full tensor) of buffers and weights on rank 0, in a fixed order.

        Weights are in the model's dtype. Collective over the world, as `gather` is. Checks the range first.
        """
        self.check(min(limit, MESSAGE_BYTES // 16))
        model = self.model
        yield from gather(model, model.buffers, torch.Tensor.detach, torch.float32, limit)
        yield from gather(model, model.weights, lambda p: _merged(model, p), model.dtype, limit)


@torch.no_grad()
def gather(
    model: Model, shards: Shards, value: Value, dtype: torch.dtype, limit: int = MESSAGE_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, full tensor) on rank 0 of a value that each of `shards` has.

    dtype: of the values. Collective over the world: every rank must exhaust it; the others yield
    nothing. Shards that lie on the same ranks travel together, at most `limit` bytes of full tensors:
    a layer's experts are one message, not hundreds.
    """
    world, stages = model.world, _stages(model, shards)
    stacks = _Stacks(model)
    # Chunk by chunk, and within it stage by stage: the order of the model's layers.
    for chunk, local in enumerate(shards.by_chunk):
        for stage, layout in enumerate(stages):
            for first, last in _batches(model, layout[chunk], dtype.itemsize, limit):
                batch = layout[chunk][first:last]
                axes = _axes(model, batch[0])
                flat: torch.Tensor | None = None
                if stage == world.pipeline.rank:
                    flat = _joined(model, local[first:last], value, axes)
                if stage and world.is_rank0:
                    size = sum(math.prod(shape) for _, shape in batch)
                    shape = [axis.size for axis in reversed(axes)]
                    flat = torch.empty([*shape, size], dtype=dtype, device=world.device)
                    dist.recv(flat, world.leader_of(stage))
                elif stage and flat is not None:
                    dist.send(flat, 0)
                if world.is_rank0 and flat is not None:
                    for rule, tensors in _full_tensors(model, batch, flat):
                        yield from stacks.add(rule, tensors)


def drain(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Takes part in a gather on a rank that has no use for it."""
    for _ in tensors:
        pass


def _merged(model: Model, parameter: torch.Tensor) -> torch.Tensor:
    adapter = model.adapter_of.get(parameter)
    return parameter.detach() if adapter is None else adapter.merged(parameter)


Described = tuple[str, tuple[int, ...]]  # a shard's global name on the first expert rank, its shape


def _stages(model: Model, shards: Shards) -> list[list[list[Described]]]:
    """[stage][chunk][shard] of this pipeline, which rank 0 must know before it receives.

    They never change: collective over the pipeline the first time only.
    """
    if shards.stages is None:
        local = [[(s.name, tuple(s.parameter.shape)) for s in chunk] for chunk in shards.by_chunk]
        shards.stages = model.world.gather(local, model.world.pipeline)
    return shards.stages


def _axes(model: Model, shard: Described) -> list[Axis]:
    """Across which ranks a shard's full tensors, and its peers of other expert ranks, lie."""
    world = model.world
    return [world.expert_tensor, world.expert] if is_expert(shard[0]) else [world.tensor]


def _batches(
    model: Model, shards: list[Described], itemsize: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Cuts a chunk's shards into runs that travel together: (first, last + 1) of each."""
    first, size = 0, 0
    for i, shard in enumerate(shards):
        tied = model.is_tied_copy(shard[0])
        ranks = math.prod(axis.size for axis in _axes(model, shard))
        nbytes = math.prod(shard[1]) * itemsize * ranks
        if i > first and (
            tied or size + nbytes > limit or is_expert(shard[0]) != is_expert(shards[first][0])
        ):
            yield first, i
            first, size = i, 0
        if tied:  # the first stage exports the embedding
            first = i + 1
        else:
            size += nbytes
    if first < len(shards):
        yield first, len(shards)


def _joined(
    model: Model, shards: list[Shard], value: Value, axes: list[Axis]
) -> torch.Tensor | None:
    """The values of a stage's ranks on its first: [expert rank, tensor rank, numbers], or without experts.

    None elsewhere. Data-parallel replicas hold the same: the first one takes part.
    """
    if model.replicas_of(shards[0]).rank:
        return None
    flat = torch.cat([value(shard.parameter).flatten() for shard in shards])
    for axis in axes:
        gathered = None
        if axis.size > 1:
            if axis.rank == 0:
                gathered = flat.new_empty(axis.size, *flat.shape)
            parts = list(gathered.unbind()) if gathered is not None else None
            dist.gather(flat, parts, group=axis.group, group_dst=0)
        if axis.rank:
            return None
        flat = flat[None] if gathered is None else gathered
    return flat


def _full_tensors(
    model: Model, shards: list[Described], flat: torch.Tensor
) -> Iterator[tuple[Rule, list[torch.Tensor]]]:
    """Joins the shards of all ranks, and un-fuses them into what Hugging Face has: q, k, v; gate, up."""
    by_expert_rank = flat if flat.dim() == 3 else flat[None]
    start = 0
    for name, shape in shards:
        end = start + math.prod(shape)
        for rank, ranks in enumerate(by_expert_rank):
            rule = model.rule(model.with_expert_of(rank, name) if flat.dim() == 3 else name)
            parts = [part[start:end].view(shape) for part in ranks]
            yield rule, rule.layout.join(parts, model.spec.shapes)
        start = end


class _Stacks:
    """Tensors that hold all experts of a layer, while these come in."""

    def __init__(self, model: Model) -> None:
        self.experts = model.config.num_moe_experts
        self.open: dict[str, tuple[torch.Tensor, set[int]]] = {}

    def add(self, rule: Rule, tensors: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The Hugging Face tensors that are complete now."""
        if rule.expert is None:
            yield from zip(rule.hf, tensors, strict=True)
            return
        (name,), (tensor,) = rule.hf, tensors
        if name not in self.open:
            self.open[name] = tensor.new_empty(self.experts, *tensor.shape), set()
        stack, present = self.open[name]
        stack[rule.expert] = tensor
        present.add(rule.expert)
        if len(present) == self.experts:
            del self.open[name]
            yield name, stack


@torch.no_grad()
def _check_range(model: Model, rollout_dtype: torch.dtype, limit: int) -> None:
    """Raises WeightRangeError on all ranks if any has a weight that servers cannot hold."""
    weight_most, buffer_most = torch.finfo(rollout_dtype).max, torch.finfo(torch.float32).max
    batches = [
        *((batch, buffer_most) for batch in _joined_small(model, model.buffers, limit)),
        *((batch, weight_most) for batch in _joined_small(model, model.weights, limit)),
    ]
    # Brought to the host at once: each by itself would wait for the device.
    found = torch.stack([largest for (_, largest), _ in batches]).tolist()
    bad = []
    for ((shards, _), most), largest in zip(batches, found, strict=True):
        if not largest <= most:  # NaN as well
            for shard in shards:
                each = largest_magnitude(_merged(model, shard.parameter)).item()
                if not each <= most:
                    bad.append(f"{shard.name} reaches {each:g}")
    counts = torch.tensor([float(len(bad))], device=model.world.device)
    dist.all_reduce(counts)
    if counts.item():
        local = f"; on rank {model.world.rank}: {', '.join(bad[:5])}" if bad else ""
        raise WeightRangeError(
            f"{int(counts.item())} parameter shard(s) hold values beyond {rollout_dtype} (largest number "
            f"{weight_most:g}){local}. Nothing was published; the servers keep the last good version"
        )


def _joined_small(
    model: Model, shards: Iterable[Shard], limit: int
) -> Iterator[tuple[list[Shard], torch.Tensor]]:
    """Shards, and the largest magnitude of these: of a large one, or of small ones, joined up to `limit` bytes.

    There may be thousands of experts, and looking at each by itself takes longer than copying them.
    """

    def kind(shard: Shard) -> tuple[bool, torch.dtype]:
        return shard.parameter.nbytes < min(limit, _SMALL_BYTES), shard.parameter.dtype

    for (is_small, _), run in itertools.groupby(shards, kind):
        few: list[Shard] = []
        for shard in run:
            if few and (
                not is_small
                or sum(s.parameter.nbytes for s in few) + shard.parameter.nbytes > limit
            ):
                yield few, _largest(model, few)
                few = []
            few.append(shard)
        yield few, _largest(model, few)


def _largest(model: Model, shards: list[Shard]) -> torch.Tensor:
    tensors = [shard.parameter for shard in shards]
    if model.adapter_of:
        tensors = [_merged(model, tensor) for tensor in tensors]
    return largest_magnitude(_flatten_dense_tensors(tensors) if len(tensors) > 1 else tensors[0])
