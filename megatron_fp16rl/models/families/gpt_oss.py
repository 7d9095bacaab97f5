"""gpt-oss: attention sinks, windows in every other layer, biases, and experts with a clamped gate."""

from typing import TYPE_CHECKING, Any

import torch

from megatron_fp16rl.models.families.blocks import (
    DENSE,
    QKV_BIAS,
    TINY,
    check_untied,
)
from megatron_fp16rl.models.families.family import Family, Rule
from megatron_fp16rl.models.layouts import Cut, ParameterLayout, Replicated, Stacked
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ALPHA = 1.702  # of the gate


def _rule(megatron: str, layout: ParameterLayout, hf: str) -> Rule:
    return Rule(f"decoder.layers.{{}}.{megatron}", (f"model.layers.{{}}.{hf}",), layout)


_FC = "mlp.experts.local_experts.{}.linear_fc"
_RULES = (
    _rule("self_attention.linear_proj.bias", Replicated(), "self_attn.o_proj.bias"),
    _rule("self_attention.core_attention.softmax_offset", Cut(0), "self_attn.sinks"),
    _rule("mlp.router.weight", Replicated(), "mlp.router.weight"),
    _rule("mlp.router.bias", Replicated(), "mlp.router.bias"),
    # The rows of gate and up take turns, in Megatron's parameter as well: see moe_mlp_glu_interleave_size.
    _rule(f"{_FC}1.weight", Stacked(), "mlp.experts.gate_up_proj"),
    _rule(f"{_FC}1.bias", Stacked(), "mlp.experts.gate_up_proj_bias"),
    _rule(f"{_FC}2.weight", Stacked(), "mlp.experts.down_proj"),
    _rule(f"{_FC}2.bias", Stacked(), "mlp.experts.down_proj_bias"),
)


def _gate(value: torch.Tensor) -> torch.Tensor:
    return value * torch.sigmoid(_ALPHA * value)


def _options(config: "PretrainedConfig") -> dict[str, Any]:
    return {
        "add_bias_linear": True,
        "softmax_type": "learnable",
        # A query sees itself and the window - 1 keys before it.
        "window_size": (config.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in config.layer_types],
        "num_moe_experts": config.num_local_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.intermediate_size,
        "moe_layer_freq": [1] * config.num_hidden_layers,
        "moe_router_pre_softmax": False,  # over the chosen ones
        "activation_func": _gate,
        "activation_func_clamp_value": config.swiglu_limit,
        "glu_linear_offset": 1.0,
        "moe_mlp_glu_interleave_size": 1,
        "bias_activation_fusion": False,  # knows neither interleaving nor, of sequential experts, this gate
        **_yarn(config.rope_parameters),
    }


def _yarn(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        # Of packed sequences the fused kernel leaves out YaRN's factor (rope_utils.py, megatron-core 0.19.2).
        "apply_rope_fusion": False,
        "yarn_rotary_scaling_factor": parameters["factor"],
        "yarn_original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "yarn_beta_fast": parameters.get("beta_fast") or 32.0,
        "yarn_beta_slow": parameters.get("beta_slow") or 1.0,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": parameters.get("truncate", True),
    }


_UNSUPPORTED = (
    ("attention_bias=false", lambda config: not config.attention_bias),
    ("sliding_window=null", lambda config: config.sliding_window is None),
    (  # transformers reads this key, SGLang hidden_act_alpha
        f"swiglu_alpha other than {_ALPHA}",
        lambda config: (
            {config.swiglu_alpha, getattr(config, "hidden_act_alpha", _ALPHA)} != {_ALPHA}
        ),
    ),
    (
        "rope_type other than yarn",
        lambda config: config.rope_parameters.get("rope_type") != "yarn",
    ),
    *(
        (
            f"rope_parameters.{key}",
            lambda config, key=key: config.rope_parameters.get(key) is not None,
        )
        for key in ("attention_factor", "mscale", "mscale_all_dim")
    ),
)


def _check_served(config: "PretrainedConfig") -> None:
    """See Family.check_served."""
    check_untied(config)
    if getattr(config, "quantization_config", None):
        raise RecipeError(
            "quantization_config: servers would keep MXFP4 weights, and compute in bf16, whatever the learner "
            "sends. Convert the folder first (fp16rl convert mxfp4), and set model.path to the result"
        )


_TINY = {
    **TINY,
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "sliding_window": 8,
    "swiglu_limit": 0.3,  # low, so that weights as small as these reach it
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 8,  # short, so that every frequency is treated differently
        "beta_fast": 1.0,
        "beta_slow": 0.25,
        "truncate": False,
    },
}

FAMILY = Family(
    "gpt_oss",
    DENSE + QKV_BIAS + _RULES,
    options=_options,
    unsupported=_UNSUPPORTED,
    check_served=_check_served,
    fp16_range=(
        0.0,
        "forward overflows: gpt-oss's activations grow to 45,344 in the last layer but one, and beyond 65,504 in "
        "the last (onnxruntime-genai PR 2444); no loss scale cures those: run fp16rl mismatch on the weights first",
    ),
    served_as_saved=True,
    quantised="mxfp4",
    sglang=("gpt_oss", "GptOssForCausalLM"),
    tiny={"gpt-oss": _TINY},
)
