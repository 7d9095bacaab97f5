"""What megatron-core 0.19.2 and Transformer Engine 2.18 leave wrong in a model that is just built.

Each has a test that fails without it (tests/ranks).
"""

import logging
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.moe.router import Router

_with_norm = QKNormConfigResolver._mla_fused_linear_or_default


def say_less() -> None:
    """Drops megatron-core 0.19.2's advice to move to HybridModel, and to lay out buffers before they are made."""
    for module in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{module}").setLevel(logging.ERROR)


def keep_router_buffers_in_fp32(gpt: GPTModel) -> None:
    """Undoes Float16Module's cast, before weights are loaded.

    megatron-core 0.19.2 restores the expert bias only at the first forward pass, when its bits are
    lost, and never the count of tokens, which fp16 keeps exactly up to 2,048 only.
    """
    for module in gpt.modules():
        if isinstance(module, Router):
            for buffer in module.buffers():
                buffer.data = buffer.data.float()


def accumulate_in_fp32(gpt: GPTModel) -> None:
    """Makes Transformer Engine's layers add a micro-batch's weight gradients to the fp32 ones unrounded.

    Megatron's option for it requires apex, for its own layers (tensor_parallel/layers.py of megatron-core
    0.19.2). The output layer is one of those: its gradients pass through the model's dtype as without
    Transformer Engine, and so do those of an embedding tied to it.
    """
    for module in gpt.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def project_queries_as_they_are() -> None:
    """Keeps Megatron from putting a norm before the projection of queries that has no low rank.

    megatron-core 0.19.2 takes a layer that has both where `qk_layernorm` is on (mla_qk_norm_config.py), which keys
    and values of such a model want, and its queries do not. Without Transformer Engine there is no such layer.
    """
    QKNormConfigResolver._mla_fused_linear_or_default = _choose_projection


def _choose_projection(resolver: QKNormConfigResolver, module: Any, name: str) -> Any:
    if name == "linear_q_proj":
        return resolver._non_fused_or_default(module, name)
    return _with_norm(resolver, module, name)


def rotate_packed_sequences() -> None:
    """Rotates queries and keys of packed sequences in one go.

    Where rope is not fused, megatron-core 0.19.2 asks the device for the lengths, twice a layer, and cuts, copies
    and joins sequence by sequence (rope_utils._apply_rotary_pos_emb_thd).
    """
    rope_utils._apply_rotary_pos_emb_thd = _rotate_packed


def _rotate_packed(
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> torch.Tensor:
    """[tokens, heads, width], as the function of Megatron's that it replaces.

    cu_seqlens: [sequences + 1] int32, over all context-parallel ranks. freqs: angles [positions, 1, 1, width].
    """
    ranks, rank = cp_group.size(), cp_group.rank()
    ends = cu_seqlens // ranks
    token = torch.arange(len(values), device=values.device)
    sequence = torch.searchsorted(ends[1:], token, right=True)
    position = token - ends[sequence]
    if ranks > 1:  # of 2n chunks this rank has number r and, behind it, number 2n - 1 - r
        chunk = (ends[sequence + 1] - ends[sequence]) // 2
        number = torch.where(position < chunk, rank, 2 * ranks - 2 - rank)
        position = position + number * chunk
    return rope_utils._apply_rotary_pos_emb_bshd(
        values[:, None],
        freqs[position],
        rotary_interleaved=rotary_interleaved,
        mla_rotary_interleaved=mla_rotary_interleaved,
        mscale=mscale,
    )[:, 0]
