"""Attention out of torch's fused kernels, for machines without Transformer Engine."""

import copy
import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.functional import pad


class FusedAttention(DotProductAttention):
    """Causal attention that keeps no scores: Megatron's own writes sequence x sequence of them, several times.

    Softmax and both products are in fp32, as in a GPU's kernels, which round the probabilities to half
    besides. Also for what megatron-core 0.19.2 leaves to Transformer Engine: packed sequences, sequences cut
    over context-parallel ranks, and values of another width than queries and keys ("unexpected keyword
    argument 'k_channels'"). And for what torch's kernels leave out: attention sinks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: Any,
    ) -> None:
        uncut = copy.copy(config)
        uncut.context_parallel_size = 1  # refused otherwise
        super().__init__(uncut, *args, **options)
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        causal = self.attn_mask_type is AttnMaskType.causal
        self.fuses = causal and not self.attention_dropout.p
        window = self.scale_mask_softmax.window_size
        self.before = None if window is None else window[0]  # keys that a query sees before its own
        self.is_plain = self.before is None and self.softmax_offset is None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query: [seq, batch, heads, width], or [tokens, heads, width] of packed sequences.

        key and value have as many heads, or one a group. packed_seq_params: Megatron's PackedSeqParams.
        Returns [seq, batch, heads * width], or [tokens, heads * width].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("only a causal mask is supported")
        if packed_seq_params is None:
            return self._of_rows(query, key, value, None)
        query, key, value = query[:, None], key[:, None], value[:, None]
        return self._of_rows(query, key, value, packed_seq_params)[:, 0]

    def _of_rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any
    ) -> torch.Tensor:
        """[seq, batch, heads * width]; of packed sequences there is one row."""
        # For plans, as on GPUs: no rank holds more keys than its own and its neighbour's.
        if query.is_meta:
            return self._attend(query, key, value)
        ranks = self.config.context_parallel_size
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        on_gpu = query.device.type == "cuda" and ranks == 1
        if packed is not None and on_gpu and self.fuses and self.is_plain and is_half:
            # Before lengths are read, for which the host would wait in each layer.
            return self._attend_packed(query, key, value, packed)
        lengths = [len(query) * ranks] if packed is None else packed.cu_seqlens_q.diff().tolist()
        if ranks > 1:
            return self._attend_over_ranks(query, key, value, tuple(lengths))
        if len(lengths) == 1:
            return self._attend(query, key, value)
        # Sequence by sequence: one call with a mask of blocks is six to fifteen times slower on a CPU.
        parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend(*part) for part in parts])

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[seq, batch, heads * width]. hidden: [queries, keys], true where a query must not look; None: causal."""
        if not self.fuses:
            mask = None if hidden is None else hidden[None, None]
            return super().forward(query, key, value, mask)
        width, dtype = value.shape[-1], query.dtype
        if hidden is None and self.before is not None and len(query) > self.before + 1:
            hidden = self._hidden(len(query), len(query), query.device)
        value = self._as_wide(value, query)
        # [batch, heads, seq, width]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if query.device.type != "cuda":  # a CPU's half kernels are five times slower
            query, key, value = query.float(), key.float(), value.float()
        if self.softmax_offset is None:
            output = _attend(query, key, value, self._scale, hidden)
        else:
            sinks = self.softmax_offset
            output = _attend_with_sinks(query, key, value, self._scale, hidden, sinks)
        return output[..., :width].permute(2, 0, 1, 3).to(dtype).flatten(2)

    def _hidden(self, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """[queries, keys], true where a query must not look; queries are the last of the keys' tokens."""
        place = torch.arange(keys, device=device)
        at = place[-queries:, None]
        hidden = place > at
        return hidden if self.before is None else hidden | (place < at - self.before)

    def _attend_packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: Any,
    ) -> torch.Tensor:
        """As `_attend`, of all sequences in one kernel."""
        from torch.nn.attention.varlen import varlen_attn

        width = value.shape[-1]
        value = self._as_wide(value, query)
        output = varlen_attn(
            query[:, 0],
            key[:, 0],
            value[:, 0],
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self._scale,
            window_size=(-1, 0),  # causal
            enable_gqa=query.shape[2] != key.shape[2],
        )
        assert isinstance(output, torch.Tensor)
        return output[:, None, :, :width].flatten(2)

    def _attend_over_ranks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
    ) -> torch.Tensor:
        """As `_attend`, of this rank's two chunks of each sequence; see `zigzag`. lengths: of whole sequences.

        All keys and values are gathered, and kept until the backward pass.
        """
        group = self.pg_collection.cp
        ranks, rank = group.size(), group.rank()
        order = _order_of_ranks(lengths, ranks)
        key, value = (
            gather_from_sequence_parallel_region(tensor.contiguous(), group=group)[order]
            for tensor in (key, value)
        )
        outputs, here, there = [], 0, 0
        for length in lengths:
            chunk = length // (2 * ranks)
            for number in (rank, 2 * ranks - 1 - rank):
                seen = slice(there, there + (number + 1) * chunk)
                hidden = self._hidden(chunk, (number + 1) * chunk, query.device)
                queries = query[here : here + chunk]
                outputs.append(self._attend(queries, key[seen], value[seen], hidden))
                here += chunk
            there += length
        return torch.cat(outputs)

    @property
    def _scale(self) -> float:
        return self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)

    @staticmethod
    def _as_wide(value: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """The kernels take equal widths."""
        missing = query.shape[-1] - value.shape[-1]
        return pad(value, (0, missing)) if missing > 0 else value


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    if query.is_meta:  # where torch would not choose a fused kernel; for plans of memory
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, True, scale=scale)[0]
    return torch.nn.functional.scaled_dot_product_attention(
        *(query, key, value),
        attn_mask=None if hidden is None else ~hidden,
        is_causal=hidden is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """As `_attend`, of softmaxes whose sums have exp(sink) besides. sinks: [heads], as scores are.

    A sink is one more key, before all others: its value is zero, and its score comes from one more dimension, in
    which it alone is not zero. Thus the sink's gradient is that of a query, and the kernel need not know of it.
    """
    width = query.shape[-1]
    column = (sinks.to(query.dtype) / scale)[:, None, None].expand(*query.shape[:-1], 1)
    query = pad(torch.cat([query, column], -1), (0, 7))  # kernels want a multiple of 8
    key, value = (pad(tensor, (0, 8, 1, 0)) for tensor in (key, value))
    key[:, :, 0, width] = 1.0
    if hidden is not None:
        return _attend(query, key, value, scale, pad(hidden, (1, 0)))
    # One more query as well, so that "causal" means the same.
    return _attend(pad(query, (0, 0, 1, 0)), key, value, scale, None)[:, :, 1:]


def zigzag(lengths: tuple[int, ...], ranks: int, rank: int) -> torch.Tensor:
    """Which tokens of packed sequences a context-parallel rank has, in its order.

    As Megatron and Transformer Engine cut them: of 2n chunks of a sequence, rank r of n has number r and
    number 2n - 1 - r, so that all ranks see as many pairs of tokens. lengths: multiples of 2n.
    """
    if ranks == 1:
        return torch.arange(sum(lengths))
    chosen, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).view(2 * ranks, -1)
        chosen += [chunks[rank], chunks[2 * ranks - 1 - rank]]
        start += length
    return torch.cat(chosen)


@functools.lru_cache(maxsize=8)
def _order_of_ranks(lengths: tuple[int, ...], ranks: int) -> torch.Tensor:
    """Where each token is among all ranks' tokens, one rank after the other."""
    return torch.cat([zigzag(lengths, ranks, rank) for rank in range(ranks)]).argsort()
