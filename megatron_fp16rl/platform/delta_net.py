"""Layers of a gated delta net in place of attention: Megatron's own module, and where a model has it."""

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_fp16rl.platform.local_layers import RMSNorm


class DeltaNet(GatedDeltaNet):
    """Megatron's, with the decay in fp32 as in SGLang: megatron-core 0.19.2 takes A_log's exponential in fp16."""

    def _compute_g_and_beta(
        self, A_log: torch.Tensor, dt_bias: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super()._compute_g_and_beta(A_log.float(), dt_bias, alpha, beta)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> Any:
        if hidden_states.is_meta:  # where lengths have no values; for plans of memory
            packed_seq_params = None
        return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **options)


def put_delta_nets(block: Any, config: TransformerConfig, vp_stage: int | None) -> None:
    """Replaces the attention of those layers of a pipeline stage that config.linear_attention_freq names.

    Projections are of the kind that the attention there has: with the norm before it or without.
    """
    pattern = config.linear_attention_freq
    if pattern is None:
        return
    assert isinstance(pattern, list)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    for i, layer in enumerate(block.layer_specs):
        if pattern[first + i]:
            attention = layer.submodules.self_attention.submodules
            net = GatedDeltaNetSubmodules(
                in_proj=attention.linear_qkv,
                # Its weight is a factor, also where other norms' weights are what is added to 1.
                out_norm=ModuleSpec(module=RMSNorm, params={"zero_centered": False}),
                out_proj=attention.linear_proj,
            )
            # Layers of a kind share one specification.
            layer, parts = copy.copy(layer), copy.copy(layer.submodules)
            parts.self_attention = ModuleSpec(module=DeltaNet, submodules=net)
            layer.submodules, block.layer_specs[i] = parts, layer
