"""Log-probs of given tokens from logits that are sharded over the vocabulary."""

from typing import Any

import torch
import torch.distributed as dist

_CHUNK_ELEMENTS = 1 << 24  # fp32 logits held at once: 64 MiB


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log softmax(logits / temperature) at `targets`, in fp32 nats, differentiable.

    logits [n, vocab / ranks]: this rank's columns, any float dtype. targets [n] int64. vocabulary:
    columns beyond it are padding and have probability zero. group: the tensor-parallel ranks; all
    get the same result.

    Logits of 16 bits are upcast in chunks and never saved in fp32, neither here nor for backward: memory
    is one chunk more than the logits and their gradient. fp32 logits become their gradient in place, if
    they are no leaf, and must not be read after backward. Two all-reduces forward, none backward.
    """
    return _TokenLogProbs.apply(logits, targets, vocabulary, group, temperature)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocabulary: int,
        group: dist.ProcessGroup,
        temperature: float,
    ) -> torch.Tensor:
        columns = logits.shape[1]
        first = dist.get_rank(group) * columns
        valid = max(0, min(columns, vocabulary - first))
        is_local = (targets >= first) & (targets < first + valid)
        local = (targets - first).clamp(0, max(valid, 1) - 1)

        if valid:
            highest = logits[:, :valid].amax(1).float() / temperature
        else:
            highest = torch.full_like(targets, -torch.inf, dtype=torch.float32)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)

        sums = torch.zeros(2, len(targets), dtype=torch.float32, device=logits.device)
        for rows in _chunks(logits):
            scaled = _scaled(logits[rows, :valid], temperature).sub_(highest[rows, None])
            sums[0, rows] = scaled.exp_().sum(1)
            del scaled  # or the next chunk is made beside it
        chosen = logits.gather(1, local[:, None])[:, 0].float() / temperature - highest
        sums[1] = torch.where(is_local, chosen, 0.0)
        dist.all_reduce(sums, group=group)

        log_sum = sums[0].log()
        ctx.save_for_backward(logits, local, is_local, highest + log_sum)
        ctx.valid, ctx.temperature = valid, temperature
        ctx.in_place = logits.dtype is torch.float32 and not logits.is_leaf
        return sums[1] - log_sum

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, local, is_local, log_normaliser = ctx.saved_tensors
        result = logits if ctx.in_place else torch.empty_like(logits)
        result[:, ctx.valid :] = 0
        gradient = gradient / ctx.temperature
        for rows in _chunks(logits) if ctx.valid else ():
            scaled = _scaled(logits[rows, : ctx.valid], ctx.temperature)
            slope = scaled.sub_(log_normaliser[rows, None]).exp_().neg_()
            slope.scatter_add_(1, local[rows, None], is_local[rows, None].float())
            result[rows, : ctx.valid] = slope.mul_(gradient[rows, None])
            del scaled, slope  # or the next chunk is made beside them
        return result, None, None, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """A copy in fp32, which may be written to."""
    scaled = logits.to(torch.float32, copy=True)
    return scaled if temperature == 1 else scaled.div_(temperature)


def _chunks(logits: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]
