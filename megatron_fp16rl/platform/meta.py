"""Megatron-core where nothing is computed: tensors have shapes and no values, other ranks answer nothing.

What the planner builds a rank of any world with, in one process (megatron-core 0.16.1, torch's fake
process group). The learner's own code runs on it, forward and backward, as far as it does not ask what
a tensor holds. Which experts a token gets depends on values: see `assuming`.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_fp16rl.platform import cpu, local_layers
from megatron_fp16rl.platform.patches import Patch, apply_all

NAME = "meta"
COLLECTIVES = "fake"
PAD_TO_MULTIPLE_OF = 256  # plans are made for GPUs; as `cuda` has it
tune_optimizer = cpu.tune_optimizer


@dataclass(frozen=True)
class _Assumed:
    """attention: "flash", or "local", Megatron's own, which keeps a score for each pair of tokens.
    expert_load: tokens that this rank's experts get, over what they get where all get the same.
    """

    attention: str = "flash"
    expert_load: float = 1.0


_assumed = _Assumed()


def device() -> torch.device:
    """Where tensors live: nowhere."""
    return torch.device("meta")


def describe() -> str:
    """One line for a log."""
    return "meta device, fake process group"


attention = cpu.attention


@functools.cache
def prepare_learner() -> None:
    """Makes Megatron-core build and run without a device. The process can do nothing else after it."""
    cpu.prepare_learner()
    apply_all("megatron-core", cpu.MEGATRON_VERSION, PATCHES)


def transformer_options() -> dict[str, object]:
    """As on a CPU, but weights are made where they live."""
    return {**cpu.transformer_options(), "use_cpu_initialization": False}


@contextlib.contextmanager
def assuming(attention: str = "flash", expert_load: float = 1.0) -> Iterator[None]:
    """Models are built and run so inside the block; see `_Assumed`."""
    global _assumed
    before, _assumed = _assumed, _Assumed(attention, expert_load)
    try:
        yield
    finally:
        _assumed = before


def assumed() -> _Assumed:
    """What models are built and run with at this moment."""
    return _assumed


def layer_spec(config: object, vp_stage: int | None) -> object:
    """Megatron's own layers. Attention in them keeps what flash attention keeps."""
    block = local_layers.block_spec(config, vp_stage)
    if _assumed.attention == "flash":
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = _FlashAttention
    return block


class _Flash(torch.autograd.Function):
    """Shapes of flash attention: for the backward pass it keeps its inputs, output and row sums."""

    @staticmethod
    def forward(
        ctx: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        seq, batch, heads, _ = query.shape
        output = query.new_empty(seq, batch, heads * value.shape[-1])
        row_sums = query.new_empty(batch, heads, seq, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FlashAttention(torch.nn.Module):
    """Stands where Megatron's core attention does, with the memory of Transformer Engine's."""

    def __init__(self, config: object, *_: object, **__: object) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        return _Flash.apply(query, key, value)


def _current_device() -> None:
    torch.cuda.current_device = device


def _groups() -> None:
    make = dist.new_group

    def fake_group(*args: object, **options: object) -> dist.ProcessGroup:
        return make(*args, **{**options, "backend": COLLECTIVES})

    dist.new_group = fake_group


def _balanced_experts() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, *_, **__: tensor
    token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess = _balance
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("masked_select", _masked_select)
    _kept.append(library)


_kept: list[torch.library.Library] = []  # a library's kernels go with it
_chosen = 0  # (token, expert) pairs of the layer that is being run


def _balance(dispatcher: object, routing_map: torch.Tensor) -> torch.Tensor:
    """In place of MoEAlltoAllTokenDispatcher.preprocess, which counts the tokens of each expert."""
    global _chosen
    _chosen = len(routing_map) * dispatcher.config.moe_router_topk
    share, rest = divmod(_chosen, dispatcher.num_experts)
    each = np.array([share + (expert < rest) for expert in range(dispatcher.num_experts)])
    load = min(_assumed.expert_load, dispatcher.ep_size)  # a rank cannot get more than there is
    mine = np.ceil(each[dispatcher.local_expert_indices] * load).astype(int)
    ranks = dispatcher.tp_size * dispatcher.ep_size
    dispatcher.num_out_tokens = _chosen
    if ranks > 1:
        dispatcher.input_splits = each.reshape(dispatcher.ep_size, -1).sum(1)
        dispatcher.output_splits = np.full(dispatcher.ep_size, mine.sum())
        dispatcher.output_splits_tp = np.full(dispatcher.tp_size, mine.sum() * dispatcher.ep_size)
    dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
    dispatcher.num_global_tokens_per_local_expert = torch.tensor(
        np.tile(mine, (ranks, 1)), device="cpu"
    )
    return torch.tensor(mine * ranks, device="cpu")


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(_chosen)


PATCHES = (
    Patch("meta-device", "weights and gradients would be made on the CPU", _current_device),
    Patch("meta-groups", "gloo groups would wait for ranks that are not there", _groups),
    Patch("meta-experts", "how many tokens an expert gets depends on values", _balanced_experts),
)
