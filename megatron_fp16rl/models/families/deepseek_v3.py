"""DeepSeek-V3 and R1: latent attention, and experts with a score and a bias of their own."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import (
    ATTENTION_BIAS,
    DENSE,
    SIGMOID_EXPERTS,
    SIGMOID_ROUTING,
    TINY,
    sigmoid_experts,
)
from megatron_fp16rl.models.families.family import Family, Rule
from megatron_fp16rl.models.layouts import Cut, Replicated
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LATENT_ATTENTION = tuple(
    Rule(
        f"decoder.layers.{{}}.self_attention.{megatron}.weight",
        (f"model.layers.{{}}.self_attn.{hf}.weight",),
        layout,
    )
    for megatron, hf, layout in (
        ("linear_q_proj", "q_proj", Cut(0)),  # without q_lora_rank
        ("linear_q_down_proj", "q_a_proj", Replicated()),  # with it
        ("q_layernorm", "q_a_layernorm", Replicated()),
        ("linear_q_up_proj", "q_b_proj", Cut(0)),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa", Replicated()),
        ("kv_layernorm", "kv_a_layernorm", Replicated()),
        ("linear_kv_up_proj", "kv_b_proj", Cut(0)),
    )
)


def _latent_attention(config: "PretrainedConfig") -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        **_latent_rope(config.rope_parameters),
    }


def _latent_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Megatron's latent attention has a rope of its own: plain, or yarn."""
    base = {"rotary_base": parameters["rope_theta"]}
    if parameters.get("rope_type", "default") != "yarn":
        return {"rope_type": "rope", **base}
    for key, default in (("attention_factor", None), ("truncate", True)):
        if parameters.get(key, default) != default:
            raise RecipeError(
                f"rope_parameters.{key}={parameters[key]!r} is not supported; remove the key"
            )
    scales = parameters.get("mscale") or 0.0, parameters.get("mscale_all_dim") or 0.0
    if (scales[0] == 0.0) != (scales[1] == 0.0):  # transformers and SGLang differ here
        raise RecipeError(
            f"rope_parameters.mscale={scales[0]} with mscale_all_dim={scales[1]}: give both or neither"
        )
    return {
        "rope_type": "yarn",
        **base,
        "rotary_scaling_factor": parameters["factor"],
        "original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
        "mscale": scales[0] or 1.0,
        "mscale_all_dim": scales[1],
    }


_UNSUPPORTED = (
    ATTENTION_BIAS,
    *SIGMOID_ROUTING,
    ("rope_interleave=false", lambda config: not config.rope_interleave),
    # transformers fixes that of the latent norms, Megatron has one for all
    ("rms_norm_eps other than 1e-6", lambda config: config.rms_norm_eps != 1e-6),
    (
        "num_key_value_heads other than num_attention_heads",
        lambda config: config.num_key_value_heads != config.num_attention_heads,
    ),
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
    **{key: value for key, value in TINY.items() if key not in ("head_dim", "tie_word_embeddings")},
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
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
    DENSE + _LATENT_ATTENTION + SIGMOID_EXPERTS,
    options=lambda config: {**_latent_attention(config), **sigmoid_experts(config)},
    unsupported=_UNSUPPORTED,
    fused_by_sglang=("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    fp16_range=(
        0.0,
        "forward overflows were seen elsewhere with its predecessor, whose routed experts are scaled up "
        "too; no loss scale cures those: run fp16rl mismatch on the weights first",
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
