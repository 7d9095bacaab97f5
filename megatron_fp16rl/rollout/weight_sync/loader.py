"""What runs in the ranks of a server, so that each receives only what it keeps of the weights.

SGLang 0.5.23 calls `load` (`--custom-weight-loader`; /update_weights_from_tensor, which takes the admin
key) in every tensor-parallel rank, with an empty list: what to do is read from the store of the group
that rank 0 of the learner and the servers have formed. Which parts a rank keeps is found by its own
`load_weights`: it is given tensors without data, and each copy into a parameter is written down instead
of being made.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fp16rl.models.parts import Course, Part, address, contiguous, messages, rounds, whole
from megatron_fp16rl.models.spec import served_dtype
from megatron_fp16rl.rollout.weight_sync import wire
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed
from megatron_fp16rl.rollout.weight_sync.group import NAME

_logger = logging.getLogger(__name__)
_receiver: "Receiver | None" = None


def load(model: torch.nn.Module, named_tensors: list) -> None:
    """Does what the learner has left in the store. Never raises: that would end the server."""
    global _receiver
    world = dist.distributed_c10d._world
    control = [group for group, name in world.pg_names.items() if name.startswith(NAME)]
    try:
        if not control:
            raise SyncFailed("this server is in no group with a learner")
        if _receiver is None or _receiver.control is not control[-1]:
            if _receiver is not None:
                _receiver.wires.abandon()
            _receiver = Receiver(model, control[-1])
        _receiver.obey()
    except Exception as error:
        # The learner sees it in the store, and the version that SGLang notes down now is a partial one.
        _logger.exception("a weight update failed")
        if _receiver is not None:
            _receiver.wires.give_up(f"rank {_receiver.member} of the servers: {error}")


class Receiver:
    """One rank of a server in updates from one learner."""

    def __init__(self, model: torch.nn.Module, control: dist.ProcessGroup) -> None:
        self.model, self.control = model, control
        # Among the ranks of all servers. dist.get_rank takes SGLang's own ranks for those of this group.
        self.member = control.rank() - 1
        store: Any = dist.distributed_c10d._get_process_group_store(control)
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        store = wire.connect(store.host, store.port, store.timeout.total_seconds())
        self.wires = wire.Wires(dist.distributed_c10d._world.pg_names[control], store)
        self.senders = 0
        self.order: list[int] = []  # of the course: whose message comes
        self.staged: dict[str, torch.Tensor] = {}  # tensors that load_weights gets whole

    def obey(self) -> None:
        """Carries out the command that is in the store."""
        command = wire.read_json(self.wires.store, "command")
        do: dict[str, Callable[..., None]] = {
            "plan": self.plan,
            "receive": self.receive,
            "finish": self.finish,
        }
        do[command.pop("do")](**command)

    def plan(self, ranks: int, limit: int, alone: int, dtype: str) -> None:
        """Finds what this rank wants of each sender, and tells the learner.

        ranks: of each server. limit, alone: see parts.messages. dtype: of most weights.
        """
        self.served: torch.dtype = getattr(torch, dtype)
        offers = [wire.parts_of(rows) for rows in wire.read_json(self.wires.store, "offers")]
        server, self.rank = divmod(self.member, ranks)
        wants, self.computed = wanted(self.model, shapes_of(offers), self.dtype)
        incoming = [messages(offer, wants, limit, self.dtype, alone) for offer in offers]
        self.senders, ways = len(offers), max(len(offers), ranks)
        order = rounds([len(of_sender) for of_sender in incoming], self.rank, ways)
        self.order = [sender for sender, _ in order]
        self.course = Course(
            *([incoming[sender][number] for sender, number in order], 2),
            *(self.dtype, next(self.model.parameters()).device),
        )
        rows = wire.listed(wants)
        if server == 0:
            wire.write_json(self.wires.store, f"wants/{self.rank}", rows)
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        self.wires.store.set(f"digest/{server}/{self.rank}", digest)

    def receive(self, servers: int, ranks: int, timeout_s: float) -> None:
        """Receives one update from all senders."""
        position = 1 + self.member // ranks
        holders = dict(tensors_of(self.model))
        for name, shape in self.computed.items():
            device = next(self.model.parameters()).device
            self.staged[name] = torch.empty(shape, dtype=self.dtype(name), device=device)
        holders |= self.staged
        self.course.prepare(address(holders.values()))

        def work() -> None:
            groups = [
                self.wires.group(sender, self.rank, position, 1 + servers, timeout_s)
                for sender in range(self.senders)
            ]
            receive(self.course, [groups[sender] for sender in self.order], holders)

        self.wires.watched(work, timeout_s, "receiving weights")

    def finish(self) -> None:
        """Loads what had to come whole, and has the model compute what it keeps beside its parameters."""
        from sglang.srt.model_loader.loader import post_load_weights

        staged, self.staged = self.staged, {}
        if staged:
            self.model.load_weights(iter(staged.items()))  # type: ignore[operator]
        else:
            post_load_weights(self.model)

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor travels."""
        return served_dtype(name, self.served)


def receive(
    course: Course, groups: list[dist.ProcessGroup], holders: dict[str, torch.Tensor]
) -> None:
    """Receives messages in order; each is copied to its places while the next is on its way."""
    works: list[dist.Work | None] = [None, None]

    def post(turn: int) -> None:
        if turn < len(course):
            place = course.place(turn, holders.__getitem__)
            group = groups[turn]
            works[turn % 2] = dist.broadcast(place, group=group, group_src=0, async_op=True)

    post(0)
    post(1)
    for turn in range(len(course)):
        work = works[turn % 2]
        assert work is not None
        work.wait()
        course.unpack(turn, holders.__getitem__)
        post(turn + 2)
    if course.device.type == "cuda":
        torch.cuda.synchronize(course.device)


def shapes_of(offers: list[list[Part]]) -> dict[str, tuple[int, ...]]:
    """The full tensors that all senders together offer: their names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in (part for of_sender in offers for part in of_sender):
        end = tuple(a + b for a, b in zip(part.start, part.shape, strict=True))
        shapes[part.name] = tuple(map(max, end, shapes.get(part.name, end)))
    return shapes


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters and buffers, by name."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, tensor.data


def wanted(
    model: torch.nn.Module, shapes: dict[str, tuple[int, ...]], dtype: Any
) -> tuple[list[Part], dict[str, tuple[int, ...]]]:
    """What a model's `load_weights` takes of full tensors, and which of these it has to get whole.

    The latter are tensors with which it computes; they are wanted whole too. Changes no weight. Raises
    SyncFailed where the loader cannot be followed at all.
    """
    sources = {
        name: torch.empty(shape, dtype=dtype(name), device="meta") for name, shape in shapes.items()
    }
    trace = _Trace(dict(tensors_of(model)), sources)
    unknown = f"SGLang's loader of {type(model).__name__} cannot be followed"
    try:
        with torch.no_grad(), trace:
            model.load_weights(iter(sources.items()))  # type: ignore[operator]
    except Exception as error:
        raise SyncFailed(f"{unknown}: {error}; set sync.transport: distributed") from error
    finally:
        replaced = trace.restore(model)
    if replaced:
        raise SyncFailed(f"{unknown}: it replaces {replaced[0]}; set sync.transport: distributed")
    wants = [part for name in shapes if name not in trace.computed for part in trace.wants[name]]
    computed = {name: shapes[name] for name in shapes if name in trace.computed}
    return wants + [whole(name, shape) for name, shape in computed.items()], computed


class _Trace(TorchDispatchMode):
    """Writes down copies from tensors without data into a model's, and does not make them."""

    def __init__(self, holders: dict[str, torch.Tensor], sources: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.before = holders
        self.holders = {_address(t): (n, t) for n, t in holders.items() if t.numel()}
        self.wants: dict[str, list[Part]] = {name: [] for name in sources}
        self.computed: set[str] = set()
        self.within: dict[str, set[str]] = {}  # by parameter: whose parts it takes
        # By storage: the shape of a tensor without data, and what it is made of: each box of it that is
        # a Hugging Face tensor, with that one's name; or the names that it was computed from.
        self.made: dict[int, tuple[tuple[int, ...], list[tuple[Part, str]]]] = {}
        self.tainted: dict[int, set[str]] = {}
        self.keep: list[torch.Tensor] = []  # so that no storage's number is used again
        for name, tensor in sources.items():
            self._register(tensor, [(whole(name, tuple(tensor.shape)), name)])

    def restore(self, model: torch.nn.Module) -> list[str]:
        """Gives parameters that were replaced their memory back; their names."""
        replaced = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in self.before and tensor.data_ptr() != self.before[name].data_ptr():
                tensor.data = self.before[name]
                replaced.append(name)
        return replaced

    def _register(self, tensor: torch.Tensor, boxes: list[tuple[Part, str]]) -> None:
        self.keep.append(tensor)
        self.made[_number(tensor)] = tuple(tensor.shape), boxes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if function is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self._copy(*args[:2])
            return args[0]
        if function is aten.copy_.default and (kept := self.holders.get(_address(args[1]))):
            # A parameter again, to keep beside it what follows from it, as 1 + weight of SGLang's GemmaRMSNorm.
            self.computed |= self.within.get(kept[0], set())
        fills = function in (aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
        if fills and not args[0].is_meta and _address(args[0]) in self.holders:
            return args[0]  # a constant, as of padding, that the first load has filled in
        result = function(*args, **(kwargs or {}))
        inputs = [
            t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_meta
        ]
        for output in tree_leaves(result):
            if isinstance(output, torch.Tensor) and output.is_meta and inputs:
                number = _number(output)
                if number not in self.made and number not in self.tainted:
                    self._new(function, args, inputs, output)
        return result

    def _new(
        self, function: Any, args: Any, inputs: list[torch.Tensor], output: torch.Tensor
    ) -> None:
        """A tensor that is no view: full tensors side by side, or the result of a computation."""
        self.keep.append(output)
        boxes = self._side_by_side(args) if function is torch.ops.aten.cat.default else None
        if boxes is not None:
            self._register(output, boxes)
        else:
            self.tainted[_number(output)] = set().union(*(self._names(t) for t in inputs))

    def _side_by_side(self, args: Any) -> list[tuple[Part, str]] | None:
        tensors, dim = args[0], (args[1] if len(args) > 1 else 0) % max(1, args[0][0].dim())
        boxes, at = [], 0
        for tensor in tensors:
            shape, inside = self.made.get(_number(tensor), ((), []))
            if len(inside) != 1 or shape != tuple(tensor.shape) or not tensor.is_contiguous():
                return None
            name = inside[0][1]
            start = tuple(at if d == dim else 0 for d in range(len(shape)))
            boxes.append((Part("", start, shape, "", 0, contiguous(shape)), name))
            at += shape[dim]
        return boxes

    def _names(self, tensor: torch.Tensor) -> set[str]:
        number = _number(tensor)
        if number in self.tainted:
            return self.tainted[number]
        return {name for _, name in self.made.get(number, ((), []))[1]}

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        number = _number(source)
        shape, boxes = self.made.get(number, ((), []))
        holder = self.holders.get(_address(target))
        part = None
        if holder is not None and number in self.made and target.shape == source.shape:
            part = _box(source, shape, target, *holder)
        if part is None:
            self.computed |= self._names(source)
            return
        for box, name in boxes:
            # The box in the tensor that it is a member of, and the same numbers in its own coordinates.
            if (inside := part.within(box)) is not None:
                start = tuple(a - b for a, b in zip(inside.start, box.start, strict=True))
                self.within.setdefault(inside.key, set()).add(name)
                self.wants[name].append(
                    Part(name, start, inside.shape, inside.key, inside.offset, inside.strides)
                )


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _number(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _box(
    source: torch.Tensor,
    shape: tuple[int, ...],
    target: torch.Tensor,
    key: str,
    holder: torch.Tensor,
) -> Part | None:
    """A view of a contiguous tensor of `shape` as a box of it; None if it is none.

    The dimensions of the view may be in another order, as those of a transposed one are.
    """
    start, sizes, strides = [], [1] * len(shape), [0] * len(shape)
    rest, steps = source.storage_offset(), contiguous(shape)
    for step in steps:
        start.append(rest // step if step else 0)
        rest = rest % step if step else rest
    for size, step, target_step in zip(source.shape, source.stride(), target.stride(), strict=True):
        if size == 1:
            continue
        dims = [d for d, (s, n) in enumerate(zip(steps, shape, strict=True)) if s == step and n > 1]
        if len(dims) != 1 or sizes[dims[0]] != 1:
            return None
        sizes[dims[0]], strides[dims[0]] = size, target_step
    if any(a + b > n for a, b, n in zip(start, sizes, shape, strict=True)):
        return None
    offset = int(target.storage_offset() - holder.storage_offset())
    return Part("", tuple(start), tuple(sizes), key, offset, tuple(strides))
