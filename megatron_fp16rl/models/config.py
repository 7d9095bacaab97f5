"""Reads config.json, and refuses what no model can be built from.

The file comes from other people: nothing of it is run (`auto_map`), and every size in it is checked
before it is used, or a damaged number would ask for all memory.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.recipe import Layout, RecipeError
from megatron_fp16rl.utils.files import parse_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPES = ("float64", "float32", "float16", "bfloat16", "auto")
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_MAY_BE_NULL = (
    "head_dim",
    "q_lora_rank",
    "rope_theta",
    "dtype",
    "num_nextn_predict_layers",
    "sliding_window",
)
Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and what it must be


def _whole(least: int, most: int) -> Rule:
    def is_right(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return is_right, f"must be a whole number from {least} to {most}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


_NUMBER: Rule = (_is_number, "must be a number above 0, below 1e12")  # rope's base is 1e4 to 1e9
_FLAG: Rule = (lambda value: isinstance(value, bool), "must be true or false")
_DTYPE: Rule = (
    lambda value: str(value).removeprefix("torch.") in _DTYPES,
    "is not supported: convert the weights to bf16 or fp16 first",
)
# Limits lie far above every released model, and below what takes minutes or all memory to read.
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("num_hidden_layers", "decoder_sparse_step"), _whole(1, 1 << 10)),
    **dict.fromkeys(("num_nextn_predict_layers", "first_k_dense_replace"), _whole(0, 1 << 10)),
    **dict.fromkeys(("num_experts", "n_routed_experts", "n_shared_experts"), _whole(1, 1 << 12)),
    "num_local_experts": _whole(1, 1 << 12),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group"), _whole(1, 1 << 12)),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), _whole(1, 1 << 24)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _whole(1, 1 << 24)),
    **dict.fromkeys(("moe_intermediate_size", "head_dim", "v_head_dim"), _whole(1, 1 << 24)),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), _whole(1, 1 << 24)),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), _whole(1, 1 << 24)),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), _whole(1, 1 << 31)),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _whole(1, 1 << 16)),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), _whole(1, 1 << 12)),
    "linear_conv_kernel_dim": _whole(1, 1 << 8),
    "shared_expert_intermediate_size": _whole(1, 1 << 24),
    **dict.fromkeys(("rms_norm_eps", "routed_scaling_factor", "rope_theta"), _NUMBER),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha"), _NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _FLAG),
    **dict.fromkeys(("use_sliding_window", "norm_topk_prob", "use_qk_norm"), _FLAG),
    "rope_interleave": _FLAG,
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
}
_ROPE_NUMBERS = {
    "default": ("rope_theta",),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
    "llama3": (
        *("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}
_ROPE_OPTIONAL = ("partial_rotary_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def load_config(folder: str | Path) -> "PretrainedConfig":
    """The transformers configuration of a model's folder. Raises RecipeError, naming file and key."""
    file = Path(folder) / "config.json"
    return config_of(read_object(file), str(file))


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a model's file. Raises RecipeError if there is none."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} {damage(file) or f'cannot be read: {error}'}") from None


def damage(file: Path) -> str | None:
    """Why a file cannot be read, for a message that begins with its name; None if unknown."""
    if not file.is_file():
        return "is not here" if not file.exists() else "is not a file"
    try:
        with file.open("rb") as opened:
            begin = opened.read(64)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not begin:
        return "is empty: fetch it again"
    if begin.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run git lfs pull where it was cloned"
    if begin.lstrip()[:1] == b"<":
        return "is a web page, not the file itself: fetch it with hf download"
    return None


def config_of(values: Mapping[str, Any], where: str) -> "PretrainedConfig":
    """The transformers configuration of values of a config.json. Raises RecipeError.

    where: the file or recipe key that they are from, for messages.
    """
    from transformers import AutoConfig

    from megatron_fp16rl.models.families import ALIASES, FAMILIES, REFUSED, family_named
    from megatron_fp16rl.models.spec import describe

    options = dict(values)
    name = options.pop("model_type", None)
    family = family_named(name, options.get("architectures"))
    if family is None:
        supported = [*FAMILIES, *(f"{a} of {f.sglang[1]}" for a, f in ALIASES.items())]
        why = f": {REFUSED[name]}" if isinstance(name, str) and name in REFUSED else ""
        raise RecipeError(
            f"{where}: model_type={_shown(name)} is not supported{why}; supported: {', '.join(supported)}"
        )
    try:
        _check_values({key: value for key, value in options.items() if value is not None})
        try:
            config = AutoConfig.for_model(family.model_type, **options)
        except Exception as error:  # of any type: transformers checks values in many ways
            raise RecipeError(" ".join(f"transformers refuses it: {error}".split())) from error
        known = [key for key in _RULES if key != "torch_dtype" and hasattr(config, key)]
        _check_values({key: getattr(config, key) for key in known})
        _check_together(config)
        describe(config, Layout())
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error.__cause__
    return config


def register_aliases() -> None:
    """Lets transformers, and SGLang with it, read a config.json that names a family by an alias.

    transformers 5.19 knows none of them, and would ask for code of the folder.
    """
    from transformers import AutoConfig

    from megatron_fp16rl.models.families import ALIASES

    for alias, family in ALIASES.items():
        known = type(AutoConfig.for_model(family.model_type))
        AutoConfig.register(alias, type(alias, (known,), {"model_type": alias}), exist_ok=True)


def _check(key: str, value: Any, rule: Rule) -> None:
    is_right, what = rule
    if not is_right(value):
        raise RecipeError(f"{key}={_shown(value)} {what}")


def _check_values(values: Mapping[str, Any]) -> None:
    """Raises RecipeError for a value of the wrong type or size."""
    for key, value in values.items():
        if key in _RULES and not (value is None and key in _MAY_BE_NULL):
            _check(key, value, _RULES[key])


def _check_together(config: "PretrainedConfig") -> None:
    """Raises RecipeError for sizes that contradict each other, and for ids of no token."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise RecipeError(
            f"num_key_value_heads={groups} does not divide num_attention_heads={heads}"
        )
    if getattr(config, "head_dim", None) is None:
        if hasattr(config, "head_dim"):  # transformers builds no model of it
            raise RecipeError("head_dim=null: remove the key, or give the number")
        if config.hidden_size % heads:
            raise RecipeError(
                f"num_attention_heads={heads} does not divide hidden_size={config.hidden_size}, and there "
                "is no head_dim"
            )
    experts = getattr(config, "num_experts", getattr(config, "n_routed_experts", None))
    if experts is not None:
        _check_experts(config, experts)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        raise RecipeError(f"rope_parameters={_shown(rope)} must be an object")
    for key in _ROPE_NUMBERS.get(str(rope.get("rope_type", "default")), ()):
        _check(f"rope_parameters.{key}", rope.get(key), _NUMBER)
    for key in _ROPE_OPTIONAL:
        if rope.get(key) not in (None, 0):
            _check(f"rope_parameters.{key}", rope[key], _NUMBER)
    if not 0 < (rope.get("partial_rotary_factor", 1.0) or 0) <= 1:
        raise RecipeError("rope_parameters.partial_rotary_factor must be above 0 and at most 1")
    check_ids({key: getattr(config, key, None) for key in _IDS}, config.vocab_size)


def _check_experts(config: "PretrainedConfig", experts: int) -> None:
    if config.num_experts_per_tok > experts:
        raise RecipeError(
            f"num_experts_per_tok={config.num_experts_per_tok} is more than the {experts} experts"
        )
    groups, best = getattr(config, "n_group", 1), getattr(config, "topk_group", 1)
    if experts % groups or best > groups:
        raise RecipeError(
            f"n_group={groups} must divide the {experts} experts, and topk_group={best} be no more"
        )
    dense = getattr(config, "mlp_only_layers", None)
    if dense is not None and not (
        isinstance(dense, list) and all(isinstance(layer, int) for layer in dense)
    ):
        raise RecipeError(f"mlp_only_layers={_shown(dense)} must be a list of layers' numbers")


def check_ids(values: Mapping[str, Any], vocabulary: int) -> None:
    """Raises RecipeError if the id of an end, beginning or padding is no token of the model.

    The model cannot sample such a token: no response would ever end.
    """
    for key in _IDS:
        ids = values.get(key)
        for number in ids if isinstance(ids, list) else [ids]:
            if number is None or (number == -1 and key != "eos_token_id"):  # -1: there is none
                continue
            if not _whole(0, vocabulary - 1)[0](number):
                raise RecipeError(
                    f"{key}={_shown(ids)} is no token of the model: its vocab_size is {vocabulary}"
                )


def _shown(value: Any) -> str:
    """A value for a message: short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # transformers may have converted it
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
