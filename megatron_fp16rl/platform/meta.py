"""Megatron-core on torch's meta device: tensors have shapes and no values, and there are no other ranks.

The planner builds one rank of any world on it, in one process (megatron-core 0.19.2, torch's fake process
group). The learner's own code runs forward and backward, as long as it does not read a tensor's values.
Which experts a token gets depends on values: see `assuming`.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_fp16rl.platform import cpu, local_layers
from megatron_fp16rl.platform.delta_rule import CHUNK
from megatron_fp16rl.platform.patches import Patches, apply_all

NAME = "meta"
COLLECTIVES = "fake"
PAD_TO_MULTIPLE_OF = 256  # plans are made for GPUs; as `cuda` has it
tune_optimizer = cpu.tune_optimizer
PATCHES = Patches()


@dataclass(frozen=True)
class Assumptions:
    """What models are built and run with."""

    attention: Literal["flash", "local"] = (
        "flash"  # local: Megatron's own, a score a pair of tokens
    )
    expert_load: float = 1.0  # tokens of this rank's experts, over an even share


_assumptions = Assumptions()


def device() -> torch.device:
    return torch.device("meta")


def describe() -> str:
    return "meta device, fake process group"


attention = cpu.attention


@functools.cache
def prepare_learner() -> None:
    """Patches Megatron-core to run without a device. The process can do nothing else afterwards."""
    cpu.prepare_learner()
    apply_all("megatron-core", cpu.MEGATRON_VERSION, PATCHES)


def transformer_options() -> dict[str, Any]:
    """As on a CPU, but weights are initialized on their device."""
    return {**cpu.transformer_options(), "use_cpu_initialization": False}


def fp32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Makes the copies that `cuda` makes: none of two 16-bit matrices."""
    if left.dtype is not torch.float32:
        return left.new_empty(len(left), right.shape[1], dtype=torch.float32)
    return cpu.fp32_product(left, right)


@contextlib.contextmanager
def assuming(
    attention: Literal["flash", "local"] = "flash", expert_load: float = 1.0
) -> Iterator[None]:
    """Sets the assumptions for models that are built and run inside the block."""
    global _assumptions
    before, _assumptions = _assumptions, Assumptions(attention, expert_load)
    try:
        yield
    finally:
        _assumptions = before


def assumptions() -> Assumptions:
    return _assumptions


def layer_spec(config: Any, vp_stage: int | None) -> Any:
    """Megatron's own layers, whose attention keeps the memory of flash attention's."""
    block: Any = local_layers.block_spec(config, vp_stage)
    if _assumptions.attention == "flash":
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention.submodules
            if hasattr(attention, "core_attention"):
                attention.core_attention = _FlashAttention
    return block


class _Flash(torch.autograd.Function):
    """Shapes of flash attention: for the backward pass it keeps its inputs, output and row sums."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        seq, batch, heads, _ = query.shape
        output = query.new_empty(seq, batch, heads * value.shape[-1])
        row_sums = query.new_empty(batch, heads, seq, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FlashAttention(torch.nn.Module):
    """Replaces Megatron's core attention; takes the memory of Transformer Engine's."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            sinks = torch.empty(heads, dtype=config.params_dtype, device="meta")
            self.softmax_offset = torch.nn.Parameter(sinks)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        return _Flash.apply(query, key, value)


class _DeltaRule(torch.autograd.Function):
    """Shapes of fla's chunk_gated_delta_rule (0.6), which keeps its inputs and a chunk's products of keys.

    Both passes hold a state for each chunk for a while.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        _, key, value, _, _ = inputs
        ctx.save_for_backward(*inputs, key.new_empty(*key.shape[:3], CHUNK))
        _DeltaRule._states(key, value)
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *inputs, _ = ctx.saved_tensors
        _states = [_DeltaRule._states(*inputs[1:3]) for _ in range(2)]  # and their gradients
        return tuple(torch.empty_like(tensor) for tensor in inputs)

    @staticmethod
    def _states(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, seq, heads, width = key.shape
        return key.new_empty(batch, -(-seq // CHUNK), heads, width, value.shape[-1])


@PATCHES.add(
    "meta-delta-rule", "thousands of chunks run one after the other, on tensors without values"
)
def _delta_rule() -> None:
    from megatron.core.ssm.gated_delta_net import gdn

    def rule(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        return _DeltaRule.apply(q, k, v, g, beta), None

    gdn.chunk_gated_delta_rule = rule


@PATCHES.add("meta-device", "weights and gradients would be made on the CPU")
def _current_device() -> None:
    torch.cuda.current_device = device  # type: ignore[assignment]  # a device, where an index was


@PATCHES.add("meta-groups", "gloo groups would wait for ranks that are not there")
def _groups() -> None:
    make = dist.new_group

    def fake_group(*args: Any, **options: Any) -> dist.ProcessGroup:
        return make(*args, **{**options, "backend": COLLECTIVES})

    dist.new_group = fake_group


@PATCHES.add("meta-gather", "parameters are gathered in place by an operation that wants values")
def _gather() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    def start(group: Any, **_: Any) -> None:
        group.param_gather_dispatched = True

    _ParamAndGradBucketGroup.start_param_sync = start


@PATCHES.add("meta-experts", "how many tokens an expert gets depends on values")
def _balanced_experts() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, *_, **__: tensor
    token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess = _balance
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("masked_select", _masked_select)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # a library that is freed takes its kernels along
_routed = 0  # (token, expert) pairs of the layer that is running


def _balance(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
    """Replaces MoEAlltoAllTokenDispatcher.preprocess, which counts the tokens of each expert."""
    global _routed
    _routed = len(routing_map) * dispatcher.config.moe_router_topk
    share, rest = divmod(_routed, dispatcher.num_experts)
    each = np.array([share + (expert < rest) for expert in range(dispatcher.num_experts)])
    load = min(_assumptions.expert_load, dispatcher.ep_size)  # a rank cannot get more than all
    local = np.ceil(each[dispatcher.local_expert_indices] * load).astype(int)
    ranks = dispatcher.tp_size * dispatcher.ep_size
    dispatcher.num_out_tokens = _routed
    if ranks > 1:
        dispatcher.input_splits = each.reshape(dispatcher.ep_size, -1).sum(1)
        dispatcher.output_splits = np.full(dispatcher.ep_size, local.sum())
        dispatcher.output_splits_tp = np.full(dispatcher.tp_size, local.sum() * dispatcher.ep_size)
    dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
    dispatcher.num_global_tokens_per_local_expert = torch.tensor(
        np.tile(local, (ranks, 1)), device="cpu"
    )
    return torch.tensor(local * ranks, device="cpu")


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(_routed)
