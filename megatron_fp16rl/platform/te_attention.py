"""Which kernel Transformer Engine's attention uses: it falls back to a slow one without a message."""

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def kernel(config: "TransformerConfig", dtype: torch.dtype, tokens: int, packed: bool) -> str:
    """ "flash", "fused" (cuDNN's) or "unfused", for causal attention over `tokens` of a learner's model.

    Of layers with windows and layers without, the slower kernel.

    config: Megatron's TransformerConfig. Asks Transformer Engine 2.18 as its DotProductAttention.forward
    does (pytorch/attention/dot_product_attention); unfused attention keeps all scores in memory.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    ranks = config.tensor_model_parallel_size
    keys = values = config.kv_channels
    if config.multi_latent_attention:
        keys, values = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
        if packed:  # Megatron pads them
            values = keys
    groups = (
        config.num_attention_heads if config.multi_latent_attention else config.num_query_groups
    )
    windows = {(-1, 0), tuple(config.window_size or (-1, 0))}
    parameters = [
        utils.AttentionParams(
            qkv_dtype=dtype,
            qkv_layout="thd_thd_thd" if packed else "sbhd_sbhd_sbhd",
            num_heads=config.num_attention_heads // ranks,
            num_gqa_groups=groups // ranks,
            max_seqlen_q=tokens,
            max_seqlen_kv=tokens,
            head_dim_qk=keys,
            head_dim_v=values,
            attn_mask_type="padding_causal" if packed else "causal",
            window_size=window,
            softmax_type=config.softmax_type,
            bottom_right_diagonal=False,
            context_parallel=config.context_parallel_size > 1,
            cp_comm_type=config.cp_comm_type or "p2p",
            cp_size=config.context_parallel_size,
            core_attention_bias_shape=None,
            core_attention_bias_requires_grad=False,
            deterministic=os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0",
        )
        for window in windows
    ]
    names = set()
    for each in parameters:
        flash, _, fused, *_ = utils.get_attention_backend(each)
        names.add("flash" if flash else "fused" if fused else "unfused")
    return max(names)  # in the order of the alphabet as well
