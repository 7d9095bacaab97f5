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
# Modules that read the stream: a layer's own, and what norms and projects in one (Transformer Engine).
_READS_STREAM = re.compile(
    r"\.\w+|\.self_attention\.(?:linear_qkv|in_proj)|\.mlp\.linear_fc1|decoder\.final_layernorm"
)


@dataclass(frozen=True)
class Origin:
    """Where a non-finite value began.

    kind    "parameter": one is not finite. "forward" or "backward": in a module or in the loss.
            "reduction": gradients were finite on every rank before they were summed.
            "nowhere": all was finite this time
    module  its global name (or the parameter's), or LOSS
    value   what of the module is not finite
    order   within a kind; the lowest is the earliest
    """

    kind: str
    module: str = ""
    value: str = ""
    rank: int | None = None
    stage: int | None = None
    micro_batch: int | None = None
    order: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a file, with the numbers of layer and expert by themselves."""
        layer = _LAYER.match(self.module)
        expert = re.search(r"\.local_experts\.(\d+)", self.module)
        numbers = {"layer": layer and int(layer[1]), "expert": expert and int(expert[1])}
        return {k: v for k, v in {**asdict(self), **numbers}.items() if k != "order"}

    @property
    def in_residual_stream(self) -> bool:
        """Whether it began where a layer adds to the stream: what it adds was finite."""
        layer = _LAYER.match(self.module)
        rest = self.module[layer.end() :] if layer else self.module
        if self.value == "its output":
            return layer is not None and not rest
        return self.value == "its input" and _READS_STREAM.fullmatch(rest) is not None

    def __str__(self) -> str:
        if self.kind == "reduction":
            return "began in the reduction: gradients were finite on each rank before it"
        if self.kind == "nowhere":
            return "did not happen again: the same micro-batches gave finite values this time"
        where = f"rank {self.rank}, stage {self.stage}"
        if self.kind == "parameter":
            return f"parameter {self.module} is not finite ({where})"
        if self.micro_batch is not None:
            where += f", micro-batch {self.micro_batch}"
        return (
            f"began in the {self.kind} pass, in {self.module} ({where}): {self.value} is not finite"
        )


def trace(model: Model, rerun: Callable[[], str | None]) -> tuple[Origin, list[dict[str, Any]]]:
    """Runs `rerun` with hooks on every module. Collective over the world.

    rerun: runs micro-batches through the model, with fresh gradients; returns which quantity of the
    loss was not finite, if any. Returns the earliest origin of all ranks, and by layer the largest finite
    magnitudes in the model's dtype: of activations and of scaled gradients, and the modules that hold them.
    """
    rank, stage = model.world.rank, model.world.pipeline.rank
    origins = [
        Origin("parameter", shard.name, "the weight", rank, stage, order=(stage, number))
        for number, shard in enumerate([*model.weights, *model.adapters])
        if not _is_finite(shard.parameter)
    ]
    hooks = _Hooks(model)
    try:
        quantity = rerun()
    finally:
        hooks.remove()
    if quantity is not None:
        last = (sys.maxsize,)  # after all modules of the forward pass
        origins.append(Origin("forward", LOSS, f"a {quantity}", rank, stage, order=last))
    origins += hooks.origins
    if not all(_is_finite(shard.main_grad) for shard in model.trained):
        origins.append(Origin("reduction"))
    first = min(origins, key=_order, default=Origin("nowhere"))
    reports = model.world.gather((first, hooks.largest))
    return min((origin for origin, _ in reports), key=_order), _by_layer(
        sizes for _, sizes in reports
    )


def _order(origin: Origin) -> tuple[Any, ...]:
    return (_KINDS.index(origin.kind), origin.order, origin.rank)


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
        self._backward_of = 0  # the micro-batch whose backward pass runs
        self._handles: list[Any] = []
        pipeline = model.world.pipeline
        for chunk, gpt in enumerate(model.gpt_models):
            self._attach(gpt, chunk * pipeline.size + pipeline.rank)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach(self, gpt: GPTModel, stage: int) -> None:
        """stage: counted over the model chunks of all ranks."""
        micro_batch = -1
        keep = self._handles.append

        def begin(*_: Any) -> None:
            nonlocal micro_batch
            micro_batch += 1

        def watch(tensor: torch.Tensor, module: str, value: str) -> None:
            if tensor.requires_grad:
                record = partial(self._record_gradient, stage, micro_batch, module, value)
                tensor.register_hook(record)

        def watch_logits(_: object, __: object, output: torch.Tensor) -> None:
            if gpt.post_process:  # nothing comes before their gradient in the backward pass
                watch(output, LOSS, "the gradient of the logits")

        def before(name: str, _: object, args: Any, kwargs: Any) -> Any:
            """Gives a module views of its inputs: the gradient of a view comes from this module alone."""

            def view(value: Any) -> Any:
                is_parameter = isinstance(value, torch.nn.Parameter)
                if not _is_float(value) or not value.requires_grad or is_parameter:
                    return value
                value = value.view_as(value)
                watch(value, name, "the gradient of its input")
                return value

            return tuple(map(view, args)), {key: view(value) for key, value in kwargs.items()}

        def after(name: str, _: object, args: Any, kwargs: Any, output: Any) -> None:
            inputs = filter(_is_float, (*args, *kwargs.values()))
            what = "its output" if all(map(_is_finite, inputs)) else "its input"
            outputs = output if isinstance(output, tuple | list) else (output,)
            for value in filter(_is_float, outputs):
                watch(value, name, "the gradient of its output")
                self._record("forward", (micro_batch, stage), name, what, value)

        def on_weight(parameter: Any, name: str, of: str, gradient: torch.Tensor) -> None:
            if self.model.config.gradient_accumulation_fusion and parameter.grad_added_to_main_grad:
                gradient = parameter.main_grad  # the hook's own argument was never written
            at = (self._backward_of, -stage)
            # The moment differs from rank to rank: the clock of the others must not.
            self._record("backward", at, name, f"the gradient of its {of}", gradient, ticks=0)

        keep(gpt.register_forward_pre_hook(begin))
        keep(gpt.register_forward_hook(watch_logits))
        for local_name, module in gpt.named_modules():
            # The block's hidden states come to it from the stage before, not as arguments.
            if module is gpt or isinstance(module, TransformerBlock):
                continue
            name = self.model.global_name(gpt, local_name)
            keep(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            keep(module.register_forward_hook(partial(after, name), with_kwargs=True))
            for of, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    keep(parameter.register_hook(partial(on_weight, parameter, name, of)))

    def _record_gradient(
        self, stage: int, micro_batch: int, module: str, value: str, gradient: torch.Tensor
    ) -> None:
        self._backward_of = micro_batch
        at = (micro_batch, -stage)  # backward starts at the last stage
        self._record("backward", at, module, value, gradient)

    def _record(
        self,
        kind: str,
        at: tuple[int, int],
        module: str,
        value: str,
        tensor: torch.Tensor,
        ticks: int = 1,
    ) -> None:
        self._clock += ticks
        # "decoder" holds the layers, each of which has a row of its own.
        if tensor.dtype is self.model.dtype and module not in (LOSS, "decoder"):
            sizes = self.largest.setdefault(module, [0.0, 0.0])
            which = 0 if kind == "forward" else 1
            sizes[which] = max(sizes[which], _largest_finite(tensor))
        if not _is_finite(tensor):
            world, order = self.model.world, (*at, self._clock)
            where = (world.rank, world.pipeline.rank, at[0])
            self.origins.append(Origin(kind, module, value, *where, order))


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


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _largest_finite(tensor: torch.Tensor) -> float:
    sizes = tensor.detach().abs()
    return torch.where(torch.isfinite(sizes), sizes, 0).max().item() if sizes.numel() else 0.0
