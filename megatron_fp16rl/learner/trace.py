"""Where the first non-finite value begins: the same micro-batches once more, with hooks on every module.

The first output that is non-finite is the forward origin, the first gradient the backward origin: inner
modules finish before the outer ones that hold them, and what comes to a pipeline stage was seen in
the one before.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_fp16rl.learner.model import Model

LOSS = "the loss"
_KINDS = ("parameter", "forward", "backward", "reduction", "nowhere")  # causes before effects
_LAYER = re.compile(r"decoder\.layers\.(\d+)")


@dataclass(frozen=True)
class Origin:
    """Where a non-finite value began.

    kind        "parameter": one is not finite. "forward" or "backward": in a module or in the loss.
                "reduction": gradients were finite on every rank before they were summed.
                "nowhere": all was finite this time
    module      its global name (or the parameter's), or LOSS
    value       what of the module is not finite: `not_finite` numbers of `of`
    largest_in  largest finite magnitude that went in: inputs forward, gradients of outputs backward
    order       within a kind; the lowest is the earliest
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
    order: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a file, with the numbers of layer and expert by themselves."""
        layer = _LAYER.match(self.module)
        expert = re.search(r"\.local_experts\.(\d+)", self.module)
        numbers = {"layer": layer and int(layer[1]), "expert": expert and int(expert[1])}
        return {k: v for k, v in {**asdict(self), **numbers}.items() if k != "order"}

    def __str__(self) -> str:
        if self.kind == "reduction":
            return "began in the reduction: gradients were finite on each rank before it"
        if self.kind == "nowhere":
            return "did not happen again: the same micro-batches gave finite values this time"
        where = f"rank {self.rank}, stage {self.stage}"
        count = f"{self.not_finite} of {self.of} values"
        if self.kind == "parameter":
            return f"parameter {self.module} is not finite: {count} ({where})"
        if self.micro_batch is not None:
            where += f", micro-batch {self.micro_batch}"
        text = f"began in the {self.kind} pass, in {self.module} ({where}): "
        if self.kind == "forward" and self.module == LOSS:
            return f"{text}a {self.value} is not finite, though every module's output is"
        text += f"{count} of {self.value} are not finite"
        return text if self.module == LOSS else f"{text}; largest going in: {self.largest_in:.4g}"


@dataclass(frozen=True)
class Trace:
    """What micro-batches showed when they ran with hooks, the same on every rank.

    origins  the first of each rank that has one, earliest first; never empty, of one kind and stage
    layers   largest finite magnitudes by layer, in the model's dtype: of activations and of scaled
             gradients, and the modules that hold them
    """

    origins: list[Origin]
    layers: list[dict[str, Any]]


def trace(model: Model, rerun: Callable[[], str | None]) -> Trace:
    """Runs `rerun` with hooks on every module. Collective over the world.

    rerun: runs micro-batches through the model, with fresh gradients; returns which quantity of the
    loss was not finite, if any.
    """
    origins = _non_finite_parameters(model)
    hooks = _Hooks(model)
    try:
        quantity = rerun()
    finally:
        hooks.remove()
    if quantity is not None:
        last = (sys.maxsize,)  # after all modules of the forward pass
        rank, stage = model.world.rank, model.world.pipeline.rank
        origins.append(Origin("forward", LOSS, quantity, rank, stage, order=last))
    first = min(origins + hooks.origins, key=_order, default=None)
    bad_sum = any(_count_non_finite(shard.main_grad) for shard in model.trained)
    reports = model.world.gather((first, bad_sum, hooks.largest))
    firsts = sorted((origin for origin, _, _ in reports if origin), key=_order)
    if not firsts:
        any_bad_sum = any(bad for _, bad, _ in reports)
        firsts = [Origin("reduction" if any_bad_sum else "nowhere")]
    # Other kinds and stages follow from the earliest.
    same = [o for o in firsts if (o.kind, o.stage) == (firsts[0].kind, firsts[0].stage)]
    return Trace(same, _by_layer(largest for _, _, largest in reports))


def _order(origin: Origin) -> tuple[Any, ...]:
    return (_KINDS.index(origin.kind), origin.order, origin.rank)


def _non_finite_parameters(model: Model) -> list[Origin]:
    rank, pipeline = model.world.rank, model.world.pipeline
    origins = []
    for chunk in range(len(model.chunks)):
        shards = model.weights.by_chunk[chunk] + model.adapters.by_chunk[chunk]
        for number, shard in enumerate(shards):
            if bad := _count_non_finite(shard.parameter):
                origins.append(
                    Origin(
                        *("parameter", shard.name, "weights", rank, pipeline.rank),
                        not_finite=bad,
                        of=shard.parameter.numel(),
                        order=(chunk * pipeline.size + pipeline.rank, number),
                    )
                )
    return origins


@dataclass(frozen=True)
class _Call:
    """One call of a module. stage: counted over the model chunks of all ranks."""

    module: str
    micro_batch: int
    stage: int


class _Hooks:
    """Hooks on the modules of this rank, from construction until `remove`.

    origins  whatever was non-finite; the first is where it began
    largest  by module: largest finite activation, largest finite gradient
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.origins: list[Origin] = []
        self.largest: dict[str, list[float]] = {}
        self._clock = 0  # tensors seen so far: the same on the ranks of a stage
        self._views: list[list[torch.Tensor]] = []  # inputs of each running module, innermost last
        self._backward: dict[str, tuple[_Call, float]] = {}  # last gradient of each module's output
        self._micro_batch: dict[GPTModel, int] = {}
        self._handles: list[Any] = []
        pipeline = model.world.pipeline
        for chunk, gpt in enumerate(model.gpt_models):
            self._attach(gpt, chunk * pipeline.size + pipeline.rank)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach(self, gpt: GPTModel, stage: int) -> None:
        self._micro_batch[gpt] = -1
        keep = self._handles.append
        keep(gpt.register_forward_pre_hook(self._next_micro_batch))
        keep(gpt.register_forward_hook(partial(self._watch_logits, stage)))
        for local_name, module in gpt.named_modules():
            # The block's hidden states come to it from the stage before, not as arguments.
            if module is gpt or isinstance(module, TransformerBlock):
                continue
            name = self.model.global_name(gpt, local_name)
            keep(module.register_forward_pre_hook(self._before, with_kwargs=True))
            after = partial(self._after, gpt, stage, name)
            keep(module.register_forward_hook(after, with_kwargs=True))
            for of, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    keep(parameter.register_hook(partial(self._on_grad_of, parameter, name, of)))

    def _next_micro_batch(self, gpt: GPTModel, _: object) -> None:
        self._micro_batch[gpt] += 1

    def _watch_logits(self, stage: int, gpt: GPTModel, _: object, output: torch.Tensor) -> None:
        """Watches the gradient that the loss gives to the logits: nothing comes before it in backward."""
        if gpt.post_process and output.requires_grad:
            call = _Call(LOSS, self._micro_batch[gpt], stage)
            output.register_hook(partial(self._see, "backward", call, "the gradient of the logits"))

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gives a module views of its inputs: the gradient of a view comes from this module alone."""
        views: list[torch.Tensor] = []
        self._views.append(views)

        def view(value: Any) -> Any:
            is_parameter = isinstance(value, torch.nn.Parameter)
            if not _is_float(value) or not value.requires_grad or is_parameter:
                return value
            views.append(value.view_as(value))
            return views[-1]

        return tuple(map(view, args)), {key: view(value) for key, value in kwargs.items()}

    def _after(
        self,
        gpt: GPTModel,
        stage: int,
        name: str,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        call = _Call(name, self._micro_batch[gpt], stage)
        outputs = output if isinstance(output, tuple | list) else (output,)
        for view in self._views.pop():
            if not any(view is value for value in outputs):  # passed through unchanged
                view.register_hook(
                    partial(self._see, "backward", call, "the gradient of its input")
                )
        inputs = [value for value in (*args, *kwargs.values()) if _is_float(value)]
        for value in filter(_is_float, outputs):
            if value.requires_grad:
                value.register_hook(partial(self._on_grad_of_output, call))
            bad_input = next((i for i in inputs if _count_non_finite(i)), None)
            what, seen = ("its output", value) if bad_input is None else ("its input", bad_input)
            largest_in = max(map(_largest_finite, inputs), default=0.0)
            self._see("forward", call, what, seen, largest_in=largest_in)

    def _on_grad_of_output(self, call: _Call, gradient: torch.Tensor) -> None:
        self._backward[call.module] = call, _largest_finite(gradient)
        self._see("backward", call, "the gradient of its output", gradient)

    def _on_grad_of(self, parameter: Any, name: str, of: str, gradient: torch.Tensor) -> None:
        if self.model.config.gradient_accumulation_fusion and parameter.grad_added_to_main_grad:
            gradient = parameter.main_grad  # the hook's own argument was never written
        if name in self._backward:
            call, _ = self._backward[name]
            self._see("backward", call, f"the gradient of its {of}", gradient, ticks=0)

    def _see(
        self,
        kind: str,
        call: _Call,
        value: str,
        tensor: torch.Tensor,
        largest_in: float = 0.0,
        ticks: int = 1,  # 0 where the moment differs from rank to rank
    ) -> None:
        self._clock += ticks
        if tensor.dtype is self.model.dtype and call.module != LOSS:
            sizes = self.largest.setdefault(call.module, [0.0, 0.0])
            which = 0 if kind == "forward" else 1
            sizes[which] = max(sizes[which], _largest_finite(tensor))
        bad = _count_non_finite(tensor)
        if not bad:
            return
        world, stage = self.model.world, call.stage
        if kind == "backward":
            stage = -stage  # backward starts at the last
            largest_in = self._backward.get(call.module, (call, 0.0))[1]
        self.origins.append(
            Origin(
                *(kind, call.module, value, world.rank, world.pipeline.rank, call.micro_batch),
                not_finite=bad,
                of=tensor.numel(),
                largest_in=largest_in,
                order=(call.micro_batch, stage, self._clock),
            )
        )


def _by_layer(reports: Iterable[dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Largest magnitudes of each layer, from those of its modules on all ranks, in model order."""
    rows: dict[str, dict[str, Any]] = {}
    for largest in reports:
        for module, sizes in largest.items():
            match = _LAYER.match(module) or re.match(r"(decoder\.)?\w+", module)
            layer = match[0] if match else module
            empty = {"layer": layer, "activation": 0.0, "gradient": 0.0, "in": {}}
            row = rows.setdefault(layer, empty)
            for what, size in zip(("activation", "gradient"), sizes, strict=True):
                if size > row[what]:
                    row[what], row["in"][what] = size, module

    def depth(layer: str) -> float:
        number = _LAYER.match(layer)
        return int(number[1]) if number else {"embedding": -1.0}.get(layer, math.inf)

    return sorted(rows.values(), key=lambda row: depth(row["layer"]))


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _count_non_finite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _largest_finite(tensor: torch.Tensor) -> float:
    if not tensor.numel():
        return 0.0
    sizes = tensor.detach().abs()
    return torch.where(torch.isfinite(sizes), sizes, 0).max().item()
