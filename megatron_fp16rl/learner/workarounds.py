"""What megatron-core 0.16.1 and Transformer Engine 2.11 leave wrong in a model that is just built.

Each has a test that fails without it (tests/ranks).
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import Router


def keep_router_buffers_in_fp32(gpt: GPTModel) -> None:
    """Undoes Float16Module's cast, before weights are loaded.

    megatron-core 0.16.1 restores the expert bias only at the first forward pass, when its bits are
    lost, and never the count of tokens, which fp16 keeps exactly up to 2,048 only.
    """
    for module in gpt.modules():
        if isinstance(module, Router):
            for buffer in module.buffers():
                buffer.data = buffer.data.float()


def mark_experts(gpt: GPTModel) -> None:
    """Makes gradients of experts be summed over the ranks that hold the same experts.

    megatron-core 0.16.1 treats experts as dense parameters where expert_parallel is 1, even if they
    are replicated over tensor-parallel ranks, which have different tokens: the replicas drift apart.
    """
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def accumulate_in_fp32(gpt: GPTModel) -> None:
    """Makes Transformer Engine's layers add a micro-batch's weight gradients to the fp32 ones unrounded.

    Megatron's option for it requires apex, for its own layers (tensor_parallel/layers.py of megatron-core
    0.16.1). The output layer is one of those: its gradients pass through the model's dtype as without
    Transformer Engine, and so do those of an embedding tied to it.
    """
    for module in gpt.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def mark_replicated(parameters: Iterable[torch.Tensor]) -> None:
    """Makes weights that every tensor-parallel rank holds in full count once in the gradient norm.

    Transformer Engine 2.11 marks the weights of all its linear layers as sharded (module/linear.py), also
    those that Megatron replicates: latent attention's down projections. megatron-core 0.16.1 goes by
    the mark (param_is_not_tensor_parallel_duplicate).
    """
    for parameter in parameters:
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def rotate_packed_sequences() -> None:
    """Rotates queries and keys of packed sequences in one go.

    Where rope is not fused, megatron-core 0.16.1 asks the device for the lengths, twice a layer, and cuts, copies
    and joins sequence by sequence (rope_utils._apply_rotary_pos_emb_thd).
    """
    rope_utils._apply_rotary_pos_emb_thd = _rotate_packed


def _rotate_packed(
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
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
        multi_latent_attention=multi_latent_attention,
        mscale=mscale,
    )[:, 0]
