"""Attention out of torch's fused kernels, for machines without Transformer Engine."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType


class FusedAttention(DotProductAttention):
    """Causal attention that keeps no scores: Megatron's own writes sequence x sequence of them, several times.

    Softmax and both products are in fp32, as in a GPU's kernels, which round the probabilities to half
    besides. Also for values of another width than queries and keys: megatron-core 0.16.1 passes the
    widths to its attention, and only Transformer Engine's takes them ("unexpected keyword argument
    'k_channels'").
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, *args, **options)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        causal = self.attn_mask_type is AttnMaskType.causal
        plain = config.softmax_type == "vanilla" and self.scale_mask_softmax.window_size is None
        self.fuses = causal and plain and not self.attention_dropout.p

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """query: [seq, batch, heads, width]; key and value of as many heads, or of one a group."""
        if not self.fuses or attention_mask is not None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, **options)
        width, dtype = value.shape[-1], query.dtype
        if width < query.shape[-1]:  # the kernels take equal widths
            value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
        # [batch, heads, seq, width]
        parts = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        if query.device.type != "cuda":
            parts = [part.float() for part in parts]  # a CPU's half kernels are five times slower
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)
        output = _attend(parts[0], parts[1], parts[2], scale)[..., :width]
        return output.permute(2, 0, 1, 3).to(dtype).flatten(2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    if query.is_meta:  # where torch would not choose a fused kernel; for plans of memory
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, True, scale=scale)[0]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
