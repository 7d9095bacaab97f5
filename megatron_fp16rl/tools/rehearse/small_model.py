"""A small model of the same family: few layers, small dimensions, the same kind of everything."""

HIDDEN, POSITIONS = 64, 256
_EXPERTS = 8
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NOT_KEPT = ("quantization_config", "dtype", "auto_map", "_name_or_path", "transformers_version")


def small_config(config: object, layers: int, vocabulary: int) -> dict[str, object]:
    """Values of a transformers configuration, model_type among them, of a small model of its family.

    config: the large model's. Kept are the family, what is tied, normed or biased, the kind of rope,
    which ranks latent attention has, query heads per key-value head (so heads divide by the folded
    tensor parallelism as they did by the full one), whether a head is hidden / heads wide, dense
    layers before sparse ones, groups of experts, shared experts. vocabulary: of the rehearsal's
    tokenizer.
    """
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_KEPT}
    values |= _attention(config) | _rope(config)
    values |= _layers(config, layers)
    hidden = values["hidden_size"]
    values |= {"intermediate_size": 2 * hidden, "vocab_size": vocabulary}
    values |= _experts(config, hidden)
    values |= {
        "initializer_range": 0.8 * hidden**-0.5,  # log-probs that a wrong tensor changes
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return values


def _layers(config: object, count: int) -> dict[str, object]:
    values: dict[str, object] = {"num_hidden_layers": count}
    if getattr(config, "layer_types", None):
        values["layer_types"] = config.layer_types[:count]
    if getattr(config, "first_k_dense_replace", None):
        values["first_k_dense_replace"] = 1
    if getattr(config, "mlp_only_layers", None):
        values["mlp_only_layers"] = [0]
    return values


def _attention(config: object) -> dict[str, object]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    per_group = heads // groups
    groups = min(groups, 4 if per_group == 1 else 2)
    values: dict[str, object] = {
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
    }
    if getattr(config, "kv_lora_rank", None):
        values["kv_lora_rank"] = 32
        values["q_lora_rank"] = config.q_lora_rank and 24
        values |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "head_dim": 8}
        values["v_head_dim"] = 16 if config.v_head_dim == config.qk_nope_head_dim else 12
        return {**values, "hidden_size": HIDDEN}
    width = 16 if groups * per_group <= 8 else 8
    given = getattr(config, "head_dim", None)
    if (given or config.hidden_size // heads) * heads == config.hidden_size:
        hidden = max(HIDDEN, width * groups * per_group)
        width = hidden // (groups * per_group)
        hidden = width * groups * per_group
    else:
        hidden = HIDDEN
    if given:
        values["head_dim"] = width
    return {**values, "hidden_size": hidden}


def _rope(config: object) -> dict[str, object]:
    parameters, positions = dict(config.rope_parameters), POSITIONS
    kind = parameters.get("rope_type")
    if kind == "yarn":  # so short that its frequencies differ in use
        parameters["original_max_position_embeddings"] = 8
        positions = round(8 * parameters["factor"])
    if kind == "llama3":  # Megatron fixes its numbers; see weights/families.py
        positions = 2 * parameters["original_max_position_embeddings"]
    return {"rope_parameters": parameters, "max_position_embeddings": positions}


def _experts(config: object, hidden: int) -> dict[str, object]:
    names = [n for n in _EXPERT_COUNTS if getattr(config, n, None)]
    if not names:
        return {}
    experts = min(_EXPERTS, getattr(config, names[0]))
    values: dict[str, object] = {
        **dict.fromkeys(names, experts),
        "num_experts_per_tok": min(2, config.num_experts_per_tok),
        "moe_intermediate_size": 3 * hidden // 4,
    }
    groups = getattr(config, "n_group", None) or 1
    if groups > 1:
        if config.topk_group < groups:  # the best 2 of 4 groups, and 2 experts of each
            values |= {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
        else:
            values |= {"n_group": 2, "topk_group": 2}
    if getattr(config, "n_shared_experts", None):
        values["n_shared_experts"] = min(2, config.n_shared_experts)
    if getattr(config, "shared_expert_intermediate_size", None):
        values["shared_expert_intermediate_size"] = hidden + 16
    return values
