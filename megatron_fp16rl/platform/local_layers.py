"""Megatron's own layers, for machines without Transformer Engine."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # Megatron is imported after it is patched
    from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMS norm, marked so that Megatron sums its gradient under sequence parallelism.

    megatron-core 0.19.2 refuses sequence parallelism with its own torch norm, for want of the mark.
    zero_centered: whether the weight is what is added to 1; by default as the model has it.
    """

    def __init__(
        self,
        config: "TransformerConfig",
        hidden_size: int,
        eps: float = 1e-5,
        zero_centered: bool | None = None,
        **_: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.zero_centered = config.layernorm_zero_centered_gamma
        if zero_centered is not None:
            self.zero_centered = zero_centered
        mark: Any = self.weight
        mark.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype, also of an fp32 residual stream (fp32_residual_connection)."""
        if self.zero_centered:  # rounded once, at the end, as transformers and SGLang do
            weight = 1 + self.weight.float()
            normed = torch.nn.functional.rms_norm(
                hidden.float(), self.normalized_shape, weight, self.eps
            )
            return normed.to(self.weight.dtype)
        if hidden.dtype is self.weight.dtype:
            return super().forward(hidden)
        weight = self.weight.to(hidden.dtype)
        normed = torch.nn.functional.rms_norm(hidden, self.normalized_shape, weight, self.eps)
        return normed.to(self.weight.dtype)


def norm_stream_in_fp32(block: Any, linear: type) -> None:
    """Has Transformer Engine's layers norm the residual stream by `RMSNorm` above, and project by `linear`.

    Its own norms cast the stream to the weights' dtype first (ops/basic/rmsnorm.py of 2.18), where it may have
    no such numbers; and those that are fused with a projection refuse two dtypes.
    """
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        attention, mlp = parts.self_attention.submodules, parts.mlp.keywords["submodules"]
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        if hasattr(
            attention, "linear_qkv"
        ):  # latent attention's projections have no norm before them
            attention.linear_qkv = linear
        if hasattr(mlp, "linear_fc1"):  # nor have experts
            mlp.linear_fc1 = linear


def block_spec(config: "TransformerConfig", vp_stage: int | None) -> Any:
    """The layers of this pipeline stage, dense ones and those with experts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_fp16rl.platform.delta_net import put_delta_nets
    from megatron_fp16rl.platform.local_attention import FusedAttention
    from megatron_fp16rl.platform.local_experts import Down, GateAndUp
    from megatron_fp16rl.platform.local_mla import LatentSelfAttention

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        attention = parts.self_attention.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        for norm in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, norm, IdentityOp) is not IdentityOp:
                setattr(attention, norm, RMSNorm)
        if config.multi_latent_attention and config.q_lora_rank is None:
            attention.q_layernorm = IdentityOp  # else refused: there is nothing that it would norm
        attention.core_attention = FusedAttention
        if config.multi_latent_attention:
            parts.self_attention.module = LatentSelfAttention
        if config.moe_mlp_glu_interleave_size == 1:
            linear = parts.mlp.keywords["submodules"].experts.keywords["submodules"]
            linear.linear_fc1, linear.linear_fc2 = GateAndUp, Down
    put_delta_nets(block, config, vp_stage)
    return block
