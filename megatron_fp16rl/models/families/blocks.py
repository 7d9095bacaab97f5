"""Parts of tensor tables and configurations that several families share."""

from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.families.family import Rule
from megatron_fp16rl.models.layouts import (
    Cut,
    GatedRows,
    ParameterLayout,
    QueryKeyValue,
    Replicated,
    Vocabulary,
)
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYER, _HF_LAYER = "decoder.layers.{}.", "model.layers.{}."


def _rule(layer: str, layout: ParameterLayout, *hf: str) -> Rule:
    """A rule of a tensor in every layer."""
    return Rule(_LAYER + layer, tuple(_HF_LAYER + name for name in hf), layout)


def _gate_and_up(megatron: str, hf: str) -> Rule:
    return _rule(megatron, GatedRows(), f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")


DENSE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    _rule("input_layernorm.weight", Replicated(), "input_layernorm.weight"),
    _rule(
        "self_attention.linear_qkv.weight",
        QueryKeyValue(),
        *(f"self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    _rule("self_attention.linear_proj.weight", Cut(1), "self_attn.o_proj.weight"),
    _rule("pre_mlp_layernorm.weight", Replicated(), "post_attention_layernorm.weight"),
    _gate_and_up("mlp.linear_fc1.weight", "mlp"),
    _rule("mlp.linear_fc2.weight", Cut(1), "mlp.down_proj.weight"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
QKV_BIAS = (
    _rule(
        "self_attention.linear_qkv.bias",
        QueryKeyValue(),
        *(f"self_attn.{x}_proj.bias" for x in "qkv"),
    ),
)
QK_NORM = tuple(
    _rule(f"self_attention.{x}_layernorm.weight", Replicated(), f"self_attn.{x}_norm.weight")
    for x in "qk"
)
EXPERTS = (
    _rule("mlp.router.weight", Replicated(), "mlp.gate.weight"),
    _gate_and_up("mlp.experts.local_experts.{}.linear_fc1.weight", "mlp.experts.{}"),
    _rule(
        "mlp.experts.local_experts.{}.linear_fc2.weight",
        Cut(1),
        "mlp.experts.{}.down_proj.weight",
    ),
)


# Servers have these in fp32 whatever the model's dtype. The bias is a buffer: it has no gradient.
_SCORE_BIAS = ".e_score_correction_bias"
ALWAYS_FP32 = (_SCORE_BIAS, ".A_log")
SIGMOID_EXPERTS = (
    *EXPERTS,
    _gate_and_up("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts"),
    _rule("mlp.shared_experts.linear_fc2.weight", Cut(1), "mlp.shared_experts.down_proj.weight"),
    _rule("mlp.router.expert_bias", Replicated(), f"mlp.gate{_SCORE_BIAS}"),
)


def first_dense(config: "PretrainedConfig", count: int) -> list[int]:
    """Megatron's moe_layer_freq of a model whose first `count` layers are dense, the others sparse."""
    return [int(layer >= count) for layer in range(config.num_hidden_layers)]


def sigmoid_experts(config: "PretrainedConfig", sparse: list[int]) -> dict[str, Any]:
    """DeepSeek-V3's experts: each has a score of its own, and a bias that only the choice sees.

    sparse: of each layer, whether it has experts.
    """
    grouped = config.topk_group < config.n_group
    return {
        "num_moe_experts": config.n_routed_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": sparse,
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": config.n_group if grouped else None,
        "moe_router_group_topk": config.topk_group if grouped else None,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_shared_expert_intermediate_size": config.moe_intermediate_size
        * config.n_shared_experts,
        "moe_router_enable_expert_bias": True,
        # Frozen: Megatron would move it before it is known whether the update is skipped.
        "moe_router_bias_update_rate": 0.0,
    }


def check_untied(config: "PretrainedConfig") -> None:
    """See Family.check_served."""
    # SGLang 0.5.23, models/qwen3_moe.py and models/glm4_moe.py: lm_head is made, and never tied. It stays
    # memory as it came: log-probs are uniform, or null.
    if config.tie_word_embeddings:
        raise RecipeError(
            f"tie_word_embeddings=true: SGLang leaves the output layer of a tied {config.model_type} model "
            "unset; untie it (write lm_head.weight) and set tie_word_embeddings to false"
        )


ATTENTION_BIAS = ("attention_bias", lambda config: bool(config.attention_bias))
SLIDING_WINDOW = ("use_sliding_window", lambda config: bool(config.use_sliding_window))
SIGMOID_ROUTING = (
    ("norm_topk_prob=false", lambda config: not config.norm_topk_prob),
    ("num_experts_per_tok=1", lambda config: config.num_experts_per_tok == 1),
    (  # Megatron weighs a group by its best num_experts_per_tok // topk_group, others by its best 2
        "topk_group other than half of num_experts_per_tok",
        lambda config: (
            config.topk_group < config.n_group
            and config.num_experts_per_tok // config.topk_group != 2
        ),
    ),
)
BACKWARD_OVERFLOWS = (
    2.0**15,
    "backward overflows along the residual stream, whose forward values peak around 350 (unsloth-zoo "
    "PR 866); start at 2^15 or less",
)
TINY = {  # for tests: what small models of all families share
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
