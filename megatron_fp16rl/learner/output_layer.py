"""The output layer in fp32 (`precision.head: fp32`): logits that are not rounded, of 16-bit operands."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_fp16rl import platform

_BLOCK_ELEMENTS = 1 << 24  # of the weight in fp32 at once, in a backward pass: 64 MiB


def multiply_in_fp32(layer: ColumnParallelLinear) -> None:
    """Has a layer give fp32 products of its 16-bit input and weight.

    Its collectives and the gradients that it hands on stay in 16 bits, as megatron-core 0.19.2 has them.
    """

    def product(
        input: torch.Tensor,
        weight: torch.Tensor,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,  # of a bias and of fusions, which output layers do not have
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        logits: torch.Tensor = _Product.apply(input.flatten(0, 1), weight)
        # A context-parallel rank may have no token to predict: the width is said, not derived.
        return logits.view(*input.shape[:-1], len(weight))

    patched: Any = layer
    patched._forward_impl = product


class _Product(torch.autograd.Function):
    """hidden [n, hidden] @ weight.T [hidden, columns], in fp32 both ways.

    No copy of the weight, and no gradient of it, is whole in fp32: the backward pass goes by blocks.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        product: torch.Tensor = platform.current().fp32_product(hidden, weight.T)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, weight = ctx.saved_tensors
        product, step = platform.current().fp32_product, max(1, _BLOCK_ELEMENTS // weight.shape[1])
        blocks = [slice(start, start + step) for start in range(0, len(weight), step)]
        total = torch.zeros_like(hidden, dtype=torch.float32)
        for block in blocks:
            total += product(gradient[:, block], weight[block])
        of_hidden = total.to(hidden.dtype)
        del total
        if not ctx.needs_input_grad[1]:
            return of_hidden, None
        of_weight, wide = torch.empty_like(weight), hidden.float()
        for block in blocks:
            of_weight[block] = product(gradient[:, block].T, wide)
        return of_hidden, of_weight
