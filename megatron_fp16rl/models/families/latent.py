"""Latent attention: tensor table, configuration, and what is not supported of it."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.blocks import ATTENTION_BIAS, TINY
from megatron_fp16rl.models.families.family import Rule
from megatron_fp16rl.models.layouts import Cut, Replicated
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LATENT_ATTENTION = tuple(
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


def latent_attention(config: "PretrainedConfig") -> dict[str, Any]:
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


LATENT_UNSUPPORTED = (
    ATTENTION_BIAS,
    ("rope_interleave=false", lambda config: not config.rope_interleave),
    (
        "num_key_value_heads other than num_attention_heads",
        lambda config: config.num_key_value_heads != config.num_attention_heads,
    ),
)
# SGLang makes one tensor of these two, in this order.
LATENT_FUSED = ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")
TINY_LATENT = {
    **{key: value for key, value in TINY.items() if key not in ("head_dim", "tie_word_embeddings")},
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
