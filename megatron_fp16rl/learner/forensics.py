"""Where a value that is not finite is born: the same micro-batches once more, with every module watched.

A module gives birth to it forward if its outputs are not finite though its inputs are; backward if
the gradient of an input or of a parameter is not finite though those of its outputs are. Inner
modules are judged before the outer ones they belong to: a birth in an outer module happened between
its inner ones, in a product, a sum or an activation.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_fp16rl.learner.model import Model

THE_LOSS = "the loss"
# In the order of cause and effect.
_KINDS = ("parameter", "forward", "backward", "reduction", "nowhere")
_LAYER = re.compile(r"decoder\.layers\.(\d+)")


@dataclass(frozen=True)
class Birth:
    """Where a value that is not finite came from.

    kind        "parameter": one is not finite. "forward" or "backward": in a module or in the loss.
                "reduction": gradients were finite on every rank before they were summed.
                "nowhere": all was finite this time
    module      its name (or the parameter's), layers counted over all stages and experts over all
                ranks; or THE_LOSS
    value       what of the module was found not finite
    largest_in  largest finite magnitude that went in: inputs forward, gradients of outputs backward
    """

    kind: str
    module: str = ""
    value: str = ""
    rank: int | None = None
    stage: int | None = None
    micro_batch: int | None = None
    not_finite: int = 0
    of: int = 0
    largest_in: float = 0.0
    order: tuple[int, ...] = ()  # within a kind; the lowest is the earliest

    def as_dict(self) -> dict[str, object]:
        """For a file, with the numbers of layer and expert by themselves."""
        layer = _LAYER.match(self.module)
        expert = re.search(r"\.local_experts\.(\d+)", self.module)
        numbers = {"layer": layer and int(layer[1]), "expert": expert and int(expert[1])}
        return {k: v for k, v in {**asdict(self), **numbers}.items() if k != "order"}

    def __str__(self) -> str:
        if self.kind == "reduction":
            return "born in the reduction: gradients were finite on each rank before it"
        if self.kind == "nowhere":
            return "not born again: the same micro-batches gave finite values this time"
        where = f"rank {self.rank}, stage {self.stage}"
        count = f"{self.not_finite} of {self.of} values"
        if self.kind == "parameter":
            return f"parameter {self.module} is not finite: {count} ({where})"
        if self.micro_batch is not None:
            where += f", micro-batch {self.micro_batch}"
        text = f"born in the {self.kind} pass, in {self.module} ({where}): "
        if self.kind == "forward" and self.module == THE_LOSS:
            return f"{text}a {self.value} is not finite, though every module's output is"
        text += f"{count} of {self.value} are not finite"
        return (
            text if self.module == THE_LOSS else f"{text}; largest going in: {self.largest_in:.4g}"
        )


@dataclass(frozen=True)
class Report:
    """What a watched run told, the same on every rank.

    births   the first of each rank that saw any, earliest first; never empty, and of one kind
    layers   largest finite magnitudes by layer, in the model's dtype: of activations and of scaled
             gradients, and the modules that hold them
    """

    births: list[Birth]
    layers: list[dict[str, object]]
    limit: float  # the largest number of the model's dtype

    @property
    def born(self) -> Birth:
        """The earliest."""
        return self.births[0]

    def lines(self) -> list[str]:
        """The report in a few lines."""
        rows = sorted(self.layers, key=lambda row: -max(row["activation"], row["gradient"]))
        near = [
            f"{row['layer']} (activations {row['activation']:.5g}, scaled gradients {row['gradient']:.5g})"
            for row in rows[:3]
        ]
        return [str(self.born), f"nearest to {self.limit:g}: {', '.join(near)}"]

    def as_dict(self) -> dict[str, object]:
        """The whole report, for a file."""
        return {
            "born": self.born.as_dict(),
            "also": [birth.as_dict() for birth in self.births[1:]],
            "limit": self.limit,
            "layers": self.layers,
        }


def watch(model: Model, rerun: Callable[[], str | None]) -> Report:
    """Calls `rerun` under watch. Collective over the world.

    rerun: runs micro-batches through the model, with fresh gradients; returns which quantity of the
    loss was not finite, if any.
    """
    poisoned = _poisoned_parameters(model)
    eyes = _Watch(model)
    try:
        quantity = rerun()
    finally:
        eyes.close()
    first = min(poisoned + eyes.births, key=_order, default=None)
    rank, stage = model.world.rank, model.world.pipeline.rank
    loss = None if quantity is None else Birth("forward", THE_LOSS, quantity, rank, stage)
    trained = itertools.chain(*model.trained)
    bad_sum = any(_count_bad(piece.parameter.main_grad) for piece in trained)
    everywhere: list[tuple | None] = [None] * model.world.size
    dist.all_gather_object(everywhere, (first, loss, bad_sum, eyes.largest))
    modules, losses, bad_sums, largest = zip(*everywhere, strict=True)
    found = sorted(filter(None, modules), key=_order)
    if not found or found[0].kind == "backward":  # all modules did well in the forward pass
        found = sorted([*filter(None, losses), *found], key=_order)
    if not found:
        found = [Birth("reduction" if any(bad_sums) else "nowhere")]
    found = [birth for birth in found if birth.kind == found[0].kind]  # others follow from these
    return Report(found, _by_layer(largest), torch.finfo(model.dtype).max)


def _order(birth: Birth) -> tuple[object, ...]:
    return (_KINDS.index(birth.kind), birth.order, birth.rank)


def _poisoned_parameters(model: Model) -> list[Birth]:
    world = model.world
    return [
        Birth(
            "parameter",
            piece.name,
            "weights",
            world.rank,
            world.pipeline.rank,
            not_finite=_count_bad(piece.parameter),
            of=piece.parameter.numel(),
            order=(chunk * world.pipeline.size + world.pipeline.rank, number),
        )
        for chunk in range(len(model.chunks))
        for number, piece in enumerate(model.pieces[chunk] + model.adapters[chunk])
        if _count_bad(piece.parameter)
    ]


@dataclass
class _Call:
    """One call of a module: what went in forward, what comes in backward.

    views   its inputs as it sees them, while it runs
    """

    name: str
    stage: int  # counted over the chunks of all ranks
    micro_batch: int
    in_finite: bool = True
    in_largest: float = 0.0
    gradient_finite: bool = True
    gradient_largest: float = 0.0
    views: list[torch.Tensor] = field(default_factory=list)


class _Watch:
    """Hooks on the modules of this rank.

    births    all that they saw
    largest   of each module: largest finite activation, largest finite gradient
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.births: list[Birth] = []
        self.largest: dict[str, list[float]] = {}
        self._handles = []
        self._seen = 0  # tensors so far: a clock, alike on the ranks of a stage
        self._open: list[_Call] = []  # calls under way, the innermost last
        self._backward: dict[str, _Call] = {}  # of each module, the call last reached by backward
        self._micro_batch: dict[GPTModel, int] = {}
        for chunk, core in enumerate(self.model.cores):
            world = self.model.world.pipeline
            self._attach(core, chunk * world.size + world.rank)

    def close(self) -> None:
        """Takes all hooks away."""
        for handle in self._handles:
            handle.remove()

    def _attach(self, core: GPTModel, stage: int) -> None:
        self._micro_batch[core] = -1
        self._handles += [
            core.register_forward_pre_hook(self._next_micro_batch),
            core.register_forward_hook(partial(self._logits, stage)),
        ]
        for name, module in core.named_modules():
            # The block's hidden states come to it from the stage before, not as arguments.
            if module is core or isinstance(module, TransformerBlock):
                continue
            name = self.model.numbered(core, name)
            before = partial(self._before, core, stage, name)
            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(self._after),
            ]
            for of, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                hook = partial(self._parameter_gradient, name, of, parameter)
                self._handles.append(parameter.register_hook(hook))

    def _next_micro_batch(self, core: GPTModel, _: object) -> None:
        self._micro_batch[core] += 1

    def _logits(self, stage: int, core: GPTModel, _: object, output: torch.Tensor) -> None:
        """Watches the gradient that the loss gives to the logits: nothing comes before it."""
        if core.post_process and output.requires_grad:
            call = _Call(THE_LOSS, stage, self._micro_batch[core])
            output.register_hook(partial(self._gradient_in, call, "the gradient of the logits"))

    def _before(
        self,
        core: GPTModel,
        stage: int,
        name: str,
        module: torch.nn.Module,
        args: tuple[object, ...],
        options: dict[str, object],
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        call = _Call(name, stage, self._micro_batch[core])
        self._open.append(call)
        args = tuple(self._enter(call, value) for value in args)
        return args, {key: self._enter(call, value) for key, value in options.items()}

    def _enter(self, call: _Call, value: object) -> object:
        """An input as its module is to see it: by a view, whose gradient is this module's alone."""
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        bad, largest = _count_bad(value), _largest(value)
        call.in_finite = call.in_finite and not bad
        call.in_largest = max(call.in_largest, largest)
        if not value.requires_grad or isinstance(value, torch.nn.Parameter):
            return value
        view = value.view_as(value)
        call.views.append(view)
        return view

    def _after(self, module: torch.nn.Module, _: object, output: object) -> None:
        call = self._open.pop()
        views, call.views = call.views, []
        outputs = output if isinstance(output, tuple | list) else (output,)
        for view in views:
            if not any(view is value for value in outputs):  # not handed on as it came
                view.register_hook(partial(self._gradient_in, call, "the gradient of its input"))
        for value in outputs:
            if not torch.is_tensor(value) or not value.is_floating_point():
                continue
            self._keep_largest(call.name, value, 0)
            self._seen += 1
            if call.in_finite:
                self._judge("forward", call, "its output", value, call.in_largest)
            if value.requires_grad:
                value.register_hook(partial(self._gradient_out, call))

    def _gradient_out(self, call: _Call, gradient: torch.Tensor) -> None:
        self._backward[call.name] = call
        self._keep_largest(call.name, gradient, 1)
        self._seen += 1
        call.gradient_finite = call.gradient_finite and not _count_bad(gradient)
        call.gradient_largest = max(call.gradient_largest, _largest(gradient))

    def _gradient_in(self, call: _Call, value: str, gradient: torch.Tensor) -> None:
        self._keep_largest(call.name, gradient, 1)
        self._seen += 1
        if call.gradient_finite:
            self._judge("backward", call, value, gradient, call.gradient_largest)

    def _parameter_gradient(
        self, name: str, of: str, parameter: torch.nn.Parameter, gradient: torch.Tensor
    ) -> None:
        if self.model.config.gradient_accumulation_fusion and parameter.grad_added_to_main_grad:
            gradient = parameter.main_grad  # what comes here instead was never written
        self._keep_largest(name, gradient, 1)
        call = self._backward.get(name)
        if call is not None and call.gradient_finite:
            value = f"the gradient of its {of}"
            self._judge("backward", call, value, gradient, call.gradient_largest)

    def _judge(
        self, kind: str, call: _Call, value: str, tensor: torch.Tensor, largest_in: float
    ) -> None:
        bad = _count_bad(tensor)
        if not bad:
            return
        stage = call.stage if kind == "forward" else -call.stage  # backward starts at the last
        self.births.append(
            Birth(
                kind,
                call.name,
                value,
                self.model.world.rank,
                self.model.world.pipeline.rank,
                call.micro_batch,
                bad,
                tensor.numel(),
                largest_in,
                (call.micro_batch, stage, self._seen),
            )
        )

    def _keep_largest(self, name: str, tensor: torch.Tensor, which: int) -> None:
        if tensor.dtype is self.model.dtype and name != THE_LOSS:
            kept = self.largest.setdefault(name, [0.0, 0.0])
            kept[which] = max(kept[which], _largest(tensor))


def _count_bad(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _largest(tensor: torch.Tensor) -> float:
    """The largest finite magnitude."""
    if not tensor.numel():
        return 0.0
    sizes = tensor.detach().abs()
    return torch.where(torch.isfinite(sizes), sizes, 0).max().item()


def _by_layer(everywhere: Iterable[dict[str, list[float]]]) -> list[dict[str, object]]:
    """Largest magnitudes of each layer, from those of its modules on all ranks, in model order."""
    rows: dict[str, dict[str, object]] = {}
    for largest in everywhere:
        for module, sizes in largest.items():
            layer = _LAYER.match(module)
            layer = layer[0] if layer else re.match(r"(decoder\.)?\w+", module)[0]
            row = rows.setdefault(
                layer, {"layer": layer, "activation": 0.0, "gradient": 0.0, "in": {}}
            )
            for what, size in zip(("activation", "gradient"), sizes, strict=True):
                if size > row[what]:
                    row[what], row["in"][what] = size, module
    return sorted(rows.values(), key=lambda row: _depth(row["layer"]))


def _depth(layer: str) -> float:
    number = _LAYER.match(layer)
    if number:
        return int(number[1])
    return {"embedding": -1}.get(layer, float("inf"))
