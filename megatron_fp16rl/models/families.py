"""The model families: how a Hugging Face configuration and its tensors read in Megatron."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_fp16rl.models.layouts import (
    Cut,
    GatedRows,
    QueryKeyValue,
    Replicated,
    Shapes,
    Vocabulary,
)
from megatron_fp16rl.recipe import Layout, RecipeError


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of; {} is the layer."""

    megatron: str
    hf: tuple[str, ...]
    layout: object


@dataclass(frozen=True)
class Family:
    """rules: the mapping table, in which a model may leave rows unused.

    options      config -> TransformerConfig values that are not the same in every family
    unsupported  (what, test of the config) that must not hold
    """

    rules: tuple[Rule, ...]
    options: Callable[[object], dict[str, object]] = lambda config: {}
    unsupported: tuple[tuple[str, Callable[[object], bool]], ...] = ()

    def find(self, megatron_name: str) -> Rule:
        """The rule of a parameter, with its layer (and expert) filled in.

        The name counts layers over all stages and experts over all ranks. Names of Transformer
        Engine's layers (the norm inside the next linear, experts in one module) are read as those of
        the local layers. Adapters follow from the weight they belong to. Raises KeyError for a
        parameter outside the table.
        """
        adapter = _ADAPTER.fullmatch(megatron_name)
        if adapter:
            return self._find_adapter(megatron_name, *adapter.groups())
        name = _TE_NORMS.sub(lambda m: _LOCAL_NORMS[m[1]], megatron_name)
        name = _TE_EXPERTS.sub(r"experts.local_experts.\2.\1.weight", name)
        numbers = re.findall(r"\.(\d+)\.", name)
        template = re.sub(r"\.\d+\.", ".{}.", name)
        for rule in self.rules:
            if rule.megatron == template:
                return Rule(name, tuple(n.format(*numbers) for n in rule.hf), rule.layout)
        raise KeyError(f"no rule maps Megatron's parameter {megatron_name}")

    def _find_adapter(self, name: str, linear: str, module: str, matrix: str) -> Rule:
        """The rule of the A or B of a Hugging Face module inside one of Megatron's linear layers."""
        rule = self.find(f"{linear}.weight")
        (weight,) = (hf for hf in rule.hf if hf.endswith(f".{module}.weight"))
        if rule.layout == Cut(1):
            layout = Cut(1) if matrix == "A" else Replicated()
        else:
            layout = Replicated() if matrix == "A" else Cut(0)
        return Rule(name, (f"{weight.removesuffix('weight')}lora_{matrix}.weight",), layout)


@dataclass(frozen=True)
class ModelSpec:
    """Everything that building and converting one model needs to know."""

    family: Family
    transformer: dict[str, object]  # for Megatron's TransformerConfig
    shapes: Shapes
    tied: bool  # output layer is the embedding
    rope_base: float
    rope_scaling_factor: float | None  # Llama 3's scaling, or None
    rope_fraction: float  # of a head's dimensions that are rotated
    max_positions: int
    mtp_layers: int  # layers of multi-token prediction after the last; not trained, not exported

    @property
    def latent_attention(self) -> bool:
        return "kv_lora_rank" in self.transformer


@dataclass(frozen=True)
class Routing:
    """What a mixture of experts chooses for a token: `top_k` of `experts`, in each sparse layer."""

    sparse: tuple[bool, ...]  # of each layer
    top_k: int
    experts: int


_LOCAL_NORMS = {
    "self_attention.linear_qkv": "input_layernorm.weight",
    "self_attention.linear_q_up_proj": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1": "pre_mlp_layernorm.weight",
}
_TE_NORMS = re.compile(
    r"(self_attention\.linear_(?:qkv|q_up_proj|kv_up_proj)|mlp\.linear_fc1)\.layer_norm_weight"
)
_ADAPTER = re.compile(r"(.+)_lora\.(\w+)_([AB])")
_TE_EXPERTS = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)")

_LAYER, _HF_LAYER = "decoder.layers.{}.", "model.layers.{}."


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv")


_DENSE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Rule(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), Replicated()),
    Rule(_LAYER + "self_attention.linear_qkv.weight", _qkv("weight"), QueryKeyValue()),
    Rule(
        _LAYER + "self_attention.linear_proj.weight",
        (_HF_LAYER + "self_attn.o_proj.weight",),
        Cut(1),
    ),
    Rule(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        GatedRows(),
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), Cut(1)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
_QKV_BIAS = (Rule(_LAYER + "self_attention.linear_qkv.bias", _qkv("bias"), QueryKeyValue()),)
_QK_NORM = tuple(
    Rule(
        f"{_LAYER}self_attention.{x}_layernorm.weight",
        (f"{_HF_LAYER}self_attn.{x}_norm.weight",),
        Replicated(),
    )
    for x in "qk"
)

_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
_LATENT_ATTENTION = tuple(
    Rule(f"{_ATTENTION}{megatron}.weight", (f"{_HF_ATTENTION}{hf}.weight",), layout)
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

_MLP, _EXPERT = _HF_LAYER + "mlp.", _HF_LAYER + "mlp.experts.{}."
_MOE = (
    Rule(_LAYER + "mlp.router.weight", (_MLP + "gate.weight",), Replicated()),
    Rule(
        _LAYER + "mlp.experts.local_experts.{}.linear_fc1.weight",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        GatedRows(),
    ),
    Rule(
        _LAYER + "mlp.experts.local_experts.{}.linear_fc2.weight",
        (_EXPERT + "down_proj.weight",),
        Cut(1),
    ),
)


def _shared_expert(hf: str) -> tuple[Rule, ...]:
    return (
        Rule(
            _LAYER + "mlp.shared_experts.linear_fc1.weight",
            (f"{_MLP}{hf}.gate_proj.weight", f"{_MLP}{hf}.up_proj.weight"),
            GatedRows(),
        ),
        Rule(
            _LAYER + "mlp.shared_experts.linear_fc2.weight",
            (f"{_MLP}{hf}.down_proj.weight",),
            Cut(1),
        ),
    )


_SHARED_EXPERT_GATE = (
    Rule(
        _LAYER + "mlp.shared_experts.gate_weight",
        (_MLP + "shared_expert_gate.weight",),
        Replicated(),
    ),
)
# A buffer, not a parameter: it has no gradient, and is fp32 whatever the model's dtype.
_EXPERT_BIAS = (
    Rule(
        _LAYER + "mlp.router.expert_bias",
        (_MLP + "gate.e_score_correction_bias",),
        Replicated(),
    ),
)
_ALWAYS_FP32 = ".e_score_correction_bias"
_SIGMOID_MOE = _MOE + _shared_expert("shared_experts") + _EXPERT_BIAS


def _qwen_moe(config: object) -> dict[str, object]:
    """Qwen2- and Qwen3-MoE: softmax over all experts, then the best k, renormalised or not."""
    sparse = [
        int(i not in (config.mlp_only_layers or []) and (i + 1) % config.decoder_sparse_step == 0)
        for i in range(config.num_hidden_layers)
    ]
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": sparse,
        # Softmax over the best k alone is softmax over all, renormalised over the best k.
        "moe_router_pre_softmax": not config.norm_topk_prob,
    }


def _qwen2_moe(config: object) -> dict[str, object]:
    return {
        "add_qkv_bias": True,
        **_qwen_moe(config),
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    }


def _sigmoid_moe(config: object) -> dict[str, object]:
    """DeepSeek-V3's experts: each has a score of its own, and a bias that only the choice sees."""
    grouped = config.topk_group < config.n_group
    return {
        "num_moe_experts": config.n_routed_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": [
            int(i >= config.first_k_dense_replace) for i in range(config.num_hidden_layers)
        ],
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


def _latent_attention(config: object) -> dict[str, object]:
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


def _latent_rope(parameters: dict[str, object]) -> dict[str, object]:
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


_ATTENTION_BIAS = ("attention_bias", lambda config: bool(config.attention_bias))
_SLIDING_WINDOW = ("use_sliding_window", lambda config: bool(config.use_sliding_window))
_SIGMOID_ROUTING = (
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

FAMILIES = {
    "llama": Family(
        _DENSE,
        unsupported=(_ATTENTION_BIAS, ("mlp_bias", lambda config: bool(config.mlp_bias))),
    ),
    "qwen2": Family(
        _DENSE + _QKV_BIAS,
        options=lambda config: {"add_qkv_bias": True},
        unsupported=(_SLIDING_WINDOW,),
    ),
    "qwen3": Family(
        _DENSE + _QK_NORM,
        options=lambda config: {"qk_layernorm": True},
        unsupported=(_ATTENTION_BIAS, _SLIDING_WINDOW),
    ),
    "qwen2_moe": Family(
        _DENSE + _QKV_BIAS + _MOE + _shared_expert("shared_expert") + _SHARED_EXPERT_GATE,
        options=_qwen2_moe,
        unsupported=(_SLIDING_WINDOW,),
    ),
    "qwen3_moe": Family(
        _DENSE + _QK_NORM + _MOE,
        options=lambda config: {"qk_layernorm": True, **_qwen_moe(config)},
        unsupported=(_ATTENTION_BIAS, _SLIDING_WINDOW),
    ),
    "deepseek_v3": Family(
        _DENSE + _LATENT_ATTENTION + _SIGMOID_MOE,
        options=lambda config: {**_latent_attention(config), **_sigmoid_moe(config)},
        unsupported=(
            _ATTENTION_BIAS,
            *_SIGMOID_ROUTING,
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
        ),
    ),
    "glm4_moe": Family(
        _DENSE + _QKV_BIAS + _QK_NORM + _SIGMOID_MOE,
        options=lambda config: {
            "add_qkv_bias": bool(config.attention_bias),
            "qk_layernorm": bool(config.use_qk_norm),
            **_sigmoid_moe(config),
        },
        unsupported=_SIGMOID_ROUTING,
    ),
}
_MOE_DEFAULTS = {
    "moe_router_dtype": "fp32",  # in fp16 the choice of experts depends on the last bit
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}


def served_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a server of `dtype` takes a Hugging Face tensor."""
    return torch.float32 if name.endswith(_ALWAYS_FP32) else dtype


def check_served(config: object) -> None:
    """Raises RecipeError for a model that SGLang 0.5.23 would serve wrongly without a word."""
    if config.model_type not in ("qwen2_moe", "qwen3_moe"):
        return
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise RecipeError(
            f"mlp_only_layers={config.mlp_only_layers}, decoder_sparse_step="
            f"{config.decoder_sparse_step}: SGLang takes every layer of a {config.model_type} model "
            "for sparse and would serve unset weights; only models with experts in all layers work"
        )
    if config.tie_word_embeddings:
        raise RecipeError(
            f"tie_word_embeddings: SGLang leaves the output layer of a tied {config.model_type} model "
            "unset; untie it (write lm_head.weight) and set tie_word_embeddings to false"
        )


def describe(config: object, layout: Layout) -> ModelSpec:
    """Reads a transformers configuration.

    Raises RecipeError, naming the key, where Megatron would compute something else than it says, or
    where the layout does not divide the model.
    """
    if config.model_type not in FAMILIES:
        raise RecipeError(
            f"model_type={config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    for key, holds in family.unsupported:
        if holds(config):
            raise RecipeError(f"{key} of this {config.model_type} model is not supported")
    if config.hidden_act != "silu":
        raise RecipeError(f"hidden_act={config.hidden_act!r} is not supported; only 'silu'")
    if getattr(config, "quantization_config", None):
        raise RecipeError(
            "quantization_config is not supported: convert the weights to bf16 or fp16 first"
        )
    options = {"add_qkv_bias": False, "qk_layernorm": False, **family.options(config)}
    is_moe = "num_moe_experts" in options
    rope_base, rope_factor = _rope(config.rope_parameters, "kv_lora_rank" in options)
    heads = config.num_attention_heads
    shapes = Shapes(
        heads=heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        padded_vocabulary=-(-config.vocab_size // layout.tensor_parallel) * layout.tensor_parallel,
    )
    _check_layout(config, layout, shapes, options if is_moe else {})
    return ModelSpec(
        family=family,
        transformer={
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": heads,
            "num_query_groups": shapes.groups,
            "kv_channels": shapes.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.rms_norm_eps,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **(_MOE_DEFAULTS if is_moe else {}),
            **options,
        },
        shapes=shapes,
        tied=bool(config.tie_word_embeddings),
        rope_base=rope_base,
        rope_scaling_factor=rope_factor,
        rope_fraction=_rope_fraction(config),
        max_positions=config.max_position_embeddings,
        mtp_layers=getattr(config, "num_nextn_predict_layers", None) or 0,
    )


def routing(config: object) -> Routing:
    """How a model chooses its experts. Raises RecipeError if it has none."""
    values = FAMILIES[config.model_type].options(config)
    if "num_moe_experts" not in values:
        raise RecipeError(
            f"rollout.router_replay: this {config.model_type} model has no experts; set it to false"
        )
    return Routing(
        sparse=tuple(map(bool, values["moe_layer_freq"])),
        top_k=values["moe_router_topk"],
        experts=values["num_moe_experts"],
    )


def _check_layout(config: object, layout: Layout, shapes: Shapes, moe: dict[str, object]) -> None:
    _check_uneven(config.num_hidden_layers, layout)
    stages = layout.pipeline_parallel * layout.model_chunks
    wanted = [
        ("num_key_value_heads", shapes.groups, "tensor_parallel", layout.tensor_parallel),
        ("num_attention_heads", shapes.heads, "tensor_parallel", layout.tensor_parallel),
        ("intermediate_size", config.intermediate_size, "tensor_parallel", layout.tensor_parallel),
    ]
    if not layout.uneven_stages:
        by = "pipeline_parallel x model_chunks"
        wanted.append(("num_hidden_layers", config.num_hidden_layers, by, stages))
    if moe:
        wanted += [
            ("num_experts", moe["num_moe_experts"], "expert_parallel", layout.expert_parallel),
            (
                "moe_intermediate_size",
                moe["moe_ffn_hidden_size"],
                "expert_tensor_parallel",
                layout.expert_tensor_parallel,
            ),
        ]
        if layout.tensor_parallel > 1 and not layout.sequence_parallel:
            raise RecipeError(
                f"learner.tensor_parallel={layout.tensor_parallel} of a MoE model needs "
                "learner.sequence_parallel: true (Megatron-core refuses it otherwise)"
            )
    elif layout.expert_parallel > 1 or layout.expert_tensor_parallel > 1:
        raise RecipeError(
            f"learner.expert_parallel={layout.expert_parallel}, expert_tensor_parallel="
            f"{layout.expert_tensor_parallel}: this {config.model_type} model has no experts"
        )
    for key, number, by, parts in wanted:
        if number % parts:
            good = [n for n in range(1, number + 1) if number % n == 0]
            nearest = sorted(sorted(good, key=lambda n: abs(n - parts))[:3])
            raise RecipeError(
                f"learner.{by}={parts} does not divide the model's {key}={number}; nearest that do: "
                f"{', '.join(map(str, nearest))}"
            )


def _check_uneven(layers: int, layout: Layout) -> None:
    """Whether the layers that the first and the last pipeline rank leave divide over the others."""
    given = layout.uneven_stages
    between = layout.pipeline_parallel - len(given)
    left, parts = layers - sum(given.values()), between * layout.model_chunks
    fits = left >= parts and left % parts == 0 if parts else left == 0
    if given and not fits:
        said = ", ".join(f"learner.{name}={number}" for name, number in given.items())
        name = next(iter(given))
        others = sum(given.values()) - given[name]
        good = [
            n
            for n in range(layout.model_chunks, layers - others + 1, layout.model_chunks)
            if (rest := layers - others - n) >= parts and (rest % parts == 0 if parts else not rest)
        ]
        nearest = sorted(sorted(good, key=lambda n: abs(n - given[name]))[:3])
        remedy = f"; {name} could be {', '.join(map(str, nearest))}" if nearest else ""
        raise RecipeError(
            f"{said}: of the model's num_hidden_layers={layers} that leaves {left} for the {between} "
            f"pipeline ranks between{remedy}"
        )


def _rope_fraction(config: object) -> float:
    if config.model_type != "glm4_moe":  # the others' rotary embeddings do not read the key
        return 1.0
    return config.rope_parameters.get("partial_rotary_factor", 1.0)


def _rope(parameters: dict[str, object], latent: bool) -> tuple[float, float | None]:
    kind = parameters.get("rope_type", "default")
    if kind == "default" or (latent and kind == "yarn"):  # see _latent_rope
        return parameters["rope_theta"], None
    if (
        kind == "llama3" and not latent
    ):  # Megatron fixes the other three numbers (rotary_pos_emb.py, 0.16.1)
        fixed = {
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        }
        for key, value in fixed.items():
            if parameters[key] != value:
                raise RecipeError(
                    f"rope_parameters.{key}={parameters[key]}: only {value} is supported"
                )
        return parameters["rope_theta"], parameters["factor"]
    supported = "'default', 'yarn'" if latent else "'default', 'llama3'"
    raise RecipeError(f"rope_type={kind!r} is not supported; supported: {supported}")
