"""gpt-oss's experts, for machines without Transformer Engine."""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class GateAndUp(ColumnParallelLinear):
    """An expert's first linear layer, its outputs brought from g0 u0 g1 u1 ... to g0 g1 ... u0 u1 ...

    Where moe_mlp_glu_interleave_size is 1, which megatron-core 0.19.2 has in Transformer Engine's experts only.
    """

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(*arguments, **options)
        return _halves(output), None if bias is None else _halves(bias)


class Down(RowParallelLinear):
    """An expert's second linear layer with a bias, which megatron-core 0.19.2 gets wrong twice.

    It adds the bias in place (transformer/mlp.py), which torch forbids where a custom function returns its input. And
    it sums the bias's gradient over tensor-parallel ranks (sequence_parallel), over which experts are data-parallel:
    they are summed once already.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        bias: Any = self.bias
        if bias is not None:
            bias.sequence_parallel = False

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(*arguments, **options)
        return (output if bias is None else output.clone()), bias


def _halves(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[..., ::2], rows[..., 1::2]], -1)
