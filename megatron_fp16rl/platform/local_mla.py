"""Multi-latent attention out of Megatron's own layers, for machines without Transformer Engine."""

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentDotProductAttention(DotProductAttention):
    """Megatron's attention, with values of another width than queries and keys.

    megatron-core 0.16.1 passes the widths to its attention, and only Transformer Engine's takes them
    ("unexpected keyword argument 'k_channels'").
    """

    def __init__(
        self,
        config: object,
        *args: object,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(config, *args, **options)
        self.hidden_size_per_partition = config.v_head_dim * self.num_attention_heads_per_partition


class LatentSelfAttention(MLASelfAttention):
    """Megatron's latent attention, its down projections whole on every tensor-parallel rank.

    megatron-core 0.16.1 cuts them where Transformer Engine's are whole, and gathers the result with
    a backward pass that does not add up what the ranks' heads say about the shared key: that
    gradient is wrong. Whole, they are as on GPUs. Right with sequence parallelism, or on one rank.
    """

    def __init__(self, config: object, *args: object, **options: object) -> None:
        super().__init__(config, *args, **options)
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            if hasattr(self, name):
                setattr(self, name, WholeLinear(config, getattr(self, name)))


class WholeLinear(torch.nn.Module):
    """A linear layer over this rank's part of the sequence, the same on every rank."""

    def __init__(self, config: object, like: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(
                like.output_size,
                like.input_size,
                dtype=like.weight.dtype,
                device=like.weight.device,
            )
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As Megatron's linears return it: with no bias to be added later."""
        return torch.nn.functional.linear(hidden, self.weight), None
