"""Where the tokens of a micro-batch are while the model runs: in rows or packed, on which context-parallel rank.

Everything else sees a Batch, [batch, seq]: this is the only place that knows of both.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_fp16rl.data.micro_batches import MicroBatch, padded_length
from megatron_fp16rl.parallel import Axis
from megatron_fp16rl.platform.local_attention import zigzag


@dataclass(frozen=True)
class Predictors:
    """Tokens of a batch, and where each is predicted: at the token before. [n] int64 each.

    place: in the flattened [rows, tokens] of this rank.
    """

    sequence: torch.Tensor
    position: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True)
class Arrangement:
    """This rank's tokens of a micro-batch.

    source  [rows, tokens] int64: of each token that it runs, the place in the flattened [batch, seq]; -1: padding
    place   [batch, seq] int64: of each token of the batch, the place in the flattened [rows, tokens]; -1: on another
            rank, or padding
    ends    where packed sequences end, over all ranks, after a zero; empty if each is in a row of its own
    is_cut  whether other ranks have the rest of the tokens
    """

    source: torch.Tensor
    place: torch.Tensor
    ends: list[int]
    is_cut: bool

    def take(self, values: torch.Tensor, padding: int) -> torch.Tensor:
        """[rows, tokens, ...] of [batch, seq, ...]."""
        source = self.source.to(values.device)
        taken = values.flatten(0, 1)[source.clamp(min=0)]
        is_padding = (source < 0).view(*source.shape, *[1] * (values.dim() - 2))
        return taken.masked_fill_(is_padding, padding)

    def predictors(self, mask: torch.Tensor) -> "Predictors":
        """Of the tokens in `mask` [batch, seq], those that are predicted on this rank."""
        sequence, position = mask.nonzero(as_tuple=True)
        place = self.place.to(mask.device)[sequence, position - 1]
        if not self.is_cut:
            return Predictors(sequence, position, place)
        here = place >= 0
        return Predictors(sequence[here], position[here], place[here])

    def packed(self, multiple: int, device: torch.device) -> PackedSeqParams | None:
        """What Megatron's layers need to know of packed sequences; None for rows.

        multiple: to which the longest is rounded up, for kernels are planned for it.
        """
        if not self.ends:
            return None
        ends = torch.tensor(self.ends, dtype=torch.int32).to(device)
        longest = max(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))
        longest = padded_length(longest, multiple)
        return PackedSeqParams("thd", ends, ends, None, None, longest, longest)


def arrange(micro_batch: MicroBatch, context: Axis) -> Arrangement:
    """The tokens of a micro-batch that one context-parallel rank runs."""
    seq, (rows, tokens) = max(micro_batch.lengths), micro_batch.shape
    whole = torch.full((rows, tokens), -1)
    starts = [0, *accumulate(micro_batch.rooms)]
    for i, length in enumerate(micro_batch.lengths):
        row, start = (0, starts[i]) if micro_batch.packed else (i, 0)
        whole[row, start : start + length] = torch.arange(i * seq, i * seq + length)
    # What the sequences leave of a row is one more, of padding alone.
    spans = [*micro_batch.rooms, tokens - starts[-1]] if micro_batch.packed else [tokens]
    spans = [span for span in spans if span]
    source = whole[:, zigzag(tuple(spans), context.size, context.rank)]
    flat = source.flatten()
    known = (flat >= 0).nonzero()[:, 0]
    place = torch.full((len(micro_batch.sequences) * seq,), -1)
    place[flat[known]] = known
    ends = [0, *accumulate(spans)] if micro_batch.packed else []
    return Arrangement(source, place.view(-1, seq), ends, context.size > 1)
