"""Multi-latent attention out of Megatron's own layers, for machines without Transformer Engine."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentSelfAttention(MLASelfAttention):
    """Megatron's latent attention with down projections that are not split over tensor-parallel ranks.

    megatron-core 0.19.2 splits them where Transformer Engine does not, and gathers the result with a
    backward pass that does not sum over the ranks' heads: the gradient of the shared key is wrong.
    Unsplit, they are as on GPUs. Correct with sequence parallelism, or on one rank.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            if hasattr(self, name):
                setattr(self, name, ReplicatedLinear(config, getattr(self, name)))


class ReplicatedLinear(torch.nn.Module):
    """A linear layer with a full copy on every rank, applied to this rank's part of the sequence."""

    def __init__(self, config: TransformerConfig, template: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(
                template.output_size,
                template.input_size,
                dtype=template.weight.dtype,
                device=template.weight.device,
            )
        )
        mark: Any = self.weight
        mark.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As Megatron's linears return it: with no bias to be added later."""
        return torch.nn.functional.linear(hidden, self.weight), None
