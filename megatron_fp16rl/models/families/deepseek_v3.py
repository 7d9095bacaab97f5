"""DeepSeek-V3 and R1, Kimi-K2: latent attention, and experts with a score and a bias of their own."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import (
    DENSE,
    SIGMOID_EXPERTS,
    SIGMOID_ROUTING,
    first_dense,
    sigmoid_experts,
)
from megatron_fp16rl.models.families.family import Family
from megatron_fp16rl.models.families.latent import (
    LATENT_ATTENTION,
    LATENT_FUSED,
    LATENT_UNSUPPORTED,
    TINY_LATENT,
    latent_attention,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(config: "PretrainedConfig") -> dict[str, Any]:
    return {
        **latent_attention(config),
        **sigmoid_experts(config, first_dense(config, config.first_k_dense_replace)),
    }


_UNSUPPORTED = (
    *LATENT_UNSUPPORTED,
    *SIGMOID_ROUTING,
    # transformers fixes that of the latent norms, Megatron has one for all
    ("rms_norm_eps other than 1e-6", lambda config: config.rms_norm_eps != 1e-6),
    *(  # keys of the original configuration, which SGLang reads and transformers does not
        (f"{key} other than {value}", lambda c, k=key, v=value: getattr(c, k, v) != v)
        for key, value in (
            ("topk_method", "noaux_tc"),
            ("scoring_func", "sigmoid"),
            ("moe_layer_freq", 1),
        )
    ),
)
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8,  # short, so that every frequency is treated differently
    "beta_fast": 1.0,
    "beta_slow": 0.25,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
_TINY = {
    **TINY_LATENT,
    "architectures": ["DeepseekV3ForCausalLM"],
    "rope_parameters": _YARN,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    # The original configuration's keys, which SGLang reads.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}

FAMILY = Family(
    "deepseek_v3",
    DENSE + LATENT_ATTENTION + SIGMOID_EXPERTS,
    aliases=("kimi_k2",),
    options=_options,
    unsupported=_UNSUPPORTED,
    fused_by_sglang=LATENT_FUSED,
    fp16_range=(
        0.0,
        "forward overflows with DeepSeek-V2, whose routed experts are scaled up too (vLLM's deepseek_v2.py "
        "divides the stream for them); no loss scale cures those: run fp16rl mismatch on the weights first",
    ),
    sglang=("deepseek_v2", "DeepseekV3ForCausalLM"),
    tiny={
        "deepseek-v3": _TINY,
        "deepseek-v3-plain": {  # no rank of its own for queries, plain rope, no groups
            **_TINY,
            "q_lora_rank": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "n_group": 1,
            "topk_group": 1,
        },
    },
)
