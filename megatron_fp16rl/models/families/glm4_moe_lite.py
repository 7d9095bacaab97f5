"""GLM-4.7-Flash: DeepSeek-V3's attention and experts, in layers that mlp_layer_types names."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import (
    DENSE,
    SIGMOID_EXPERTS,
    SIGMOID_ROUTING,
    check_untied,
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
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def _dense(config: "PretrainedConfig") -> int:
    """How many layers have no experts: the first ones (see _UNSUPPORTED)."""
    return int(config.mlp_layer_types.count("dense"))


def _options(config: "PretrainedConfig") -> dict[str, Any]:
    sparse = first_dense(config, _dense(config))
    return {**latent_attention(config), **sigmoid_experts(config, sparse)}


def _is_mixed(config: "PretrainedConfig") -> bool:
    dense = _dense(config)
    sparse = config.num_hidden_layers - dense
    return bool(config.mlp_layer_types != ["dense"] * dense + ["sparse"] * sparse)


_UNSUPPORTED = (
    *LATENT_UNSUPPORTED,
    *SIGMOID_ROUTING,
    ("mlp_layer_types other than dense layers, then sparse ones", _is_mixed),
    (  # transformers reads the one, SGLang and the published configuration the other
        "first_k_dense_replace other than mlp_layer_types has",
        lambda config: getattr(config, "first_k_dense_replace", None) not in (None, _dense(config)),
    ),
    (  # transformers rotates this part of qk_rope_head_dim, SGLang all of it
        "partial_rotary_factor other than 1",
        lambda config: config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
    ),
)


def _check_served(config: "PretrainedConfig") -> None:
    """See Family.check_served."""
    check_untied(config)
    if getattr(config, "first_k_dense_replace", None) is None:
        raise RecipeError(
            "SGLang asks how many layers are dense, and config.json has mlp_layer_types only: add "
            f'"first_k_dense_replace": {_dense(config)}'
        )


def _as_served(model: "PreTrainedModel") -> None:
    """Gives the norms of the latents the model's rms_norm_eps.

    transformers 5.19 fixes theirs to 1e-6, which is DeepSeek's. SGLang and vLLM take the model's, as do
    the GLM-5 layers that its authors gave to transformers (transformers PR 48762).
    """
    for name, module in model.named_modules():
        if name.endswith(("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")):
            norm: Any = module
            norm.variance_epsilon = model.config.rms_norm_eps


_TINY = {
    **TINY_LATENT,
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
}

FAMILY = Family(
    "glm4_moe_lite",
    DENSE + LATENT_ATTENTION + SIGMOID_EXPERTS,
    options=_options,
    unsupported=_UNSUPPORTED,
    check_served=_check_served,
    as_served=_as_served,
    fused_by_sglang=LATENT_FUSED,
    sglang=("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    tiny={"glm4-moe-lite": _TINY},
)
