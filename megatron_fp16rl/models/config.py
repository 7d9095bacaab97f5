"""What config.json says of a model: read, and refused where no model can be built as it says.

It comes from other people. Nothing of it is run (`auto_map`), and no size in it is believed before it
was looked at: a damaged number would ask for all memory that there is.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_fp16rl.recipe import Layout, RecipeError
from megatron_fp16rl.utils.files import parse_json

# Limits lie far above every released model, and below what takes minutes or all memory to look at.
_LAYERS, _EXPERTS, _MOST = 1 << 10, 1 << 12, 1 << 24
_COUNTS = {
    "num_hidden_layers": _LAYERS,
    "num_nextn_predict_layers": _LAYERS,
    "first_k_dense_replace": _LAYERS,
    "decoder_sparse_step": _LAYERS,
    "num_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
    "n_group": _EXPERTS,
    "topk_group": _EXPERTS,
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
            *("shared_expert_intermediate_size", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
            "v_head_dim",
        ),
        _MOST,
    ),
    "max_position_embeddings": 1 << 31,
}
_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")
_MAY_BE_NULL = ("head_dim", "q_lora_rank", "rope_theta", "dtype", "num_nextn_predict_layers")
_LARGEST = 1e12  # a base of rope is 1e4 to 1e9
_NUMBERS = ("rms_norm_eps", "routed_scaling_factor", "rope_theta")
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    *("norm_topk_prob", "use_qk_norm", "rope_interleave"),
)
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_ROPE_NUMBERS = {
    "default": ("rope_theta",),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
    "llama3": (
        *("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}
_ROPE_MAY_HAVE = ("partial_rotary_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "auto")


def load_config(folder: str | Path) -> object:
    """The transformers configuration of a model's folder.

    Raises RecipeError, naming the file and the key, where there is none, or none of a model that can
    be built.
    """
    file = Path(folder) / "config.json"
    return config_of(read_object(file), str(file))


def read_object(file: Path) -> dict[str, object]:
    """What a JSON file of a model holds. Raises RecipeError if that is no JSON object."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} {damage(file) or f'cannot be read: {error}'}") from None


def damage(file: Path) -> str | None:
    """What became of a file that cannot be read, for a message that begins with its name."""
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


def config_of(values: Mapping[str, object], where: str) -> object:
    """The transformers configuration that values of a config.json are of.

    where: the file or recipe key that they are from, for messages. Raises RecipeError.
    """
    from transformers import AutoConfig

    from megatron_fp16rl.models.families import FAMILIES
    from megatron_fp16rl.models.spec import describe

    options = dict(values)
    family = options.pop("model_type", None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise RecipeError(
            f"{where}: model_type={_shown(family)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    try:
        _check_values({key: value for key, value in options.items() if value is not None})
        try:
            config = AutoConfig.for_model(family, **options)
        except Exception as error:  # whatever transformers says of values that are none
            raise RecipeError(" ".join(f"transformers refuses it: {error}".split())) from error
        known = (*_COUNTS, *_NUMBERS, *_FLAGS, "dtype")
        _check_values({key: getattr(config, key) for key in known if hasattr(config, key)})
        _check_together(config)
        describe(config, Layout())
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error.__cause__
    return config


def _check_values(values: Mapping[str, object]) -> None:
    """Raises RecipeError for sizes that are none."""
    for key, value in values.items():
        if value is None and key in _MAY_BE_NULL:
            continue
        if key in _COUNTS:
            least = 0 if key in _MAY_BE_ZERO else 1
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= _COUNTS[key]:
                raise RecipeError(
                    f"{key}={_shown(value)} must be a whole number from {least} to {_COUNTS[key]}"
                )
        elif key in _NUMBERS and not _is_number(value):
            raise RecipeError(f"{key}={_shown(value)} must be a number above 0, below 1e12")
        elif key in _FLAGS and not isinstance(value, bool):
            raise RecipeError(f"{key}={_shown(value)} must be true or false")
        elif key in ("dtype", "torch_dtype"):
            name = str(value).removeprefix("torch.")
            if name not in _DTYPES:
                raise RecipeError(
                    f"{key}={_shown(value)} is not supported: convert the weights to bf16 or fp16 first"
                )


def _check_together(config: object) -> None:
    """Raises RecipeError for sizes that do not go with one another, and for ids of no token."""
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
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise RecipeError(f"layer_types: {', '.join(sorted(map(str, kinds)))} is not supported")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        raise RecipeError(f"rope_parameters={_shown(rope)} must be an object")
    for key in _ROPE_NUMBERS.get(str(rope.get("rope_type", "default")), ()):
        if not _is_number(rope.get(key)):
            raise RecipeError(
                f"rope_parameters.{key}={_shown(rope.get(key))} must be a number above 0, below 1e12"
            )
    for key in _ROPE_MAY_HAVE:
        if rope.get(key) not in (None, 0) and not _is_number(rope[key]):
            raise RecipeError(f"rope_parameters.{key}={_shown(rope[key])} must be a number")
    if not 0 < (rope.get("partial_rotary_factor", 1.0) or 0) <= 1:
        raise RecipeError("rope_parameters.partial_rotary_factor must be above 0 and at most 1")
    check_ids({key: getattr(config, key, None) for key in _IDS}, config.vocab_size)


def _check_experts(config: object, experts: int) -> None:
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


def check_ids(values: Mapping[str, object], vocabulary: int) -> None:
    """Raises RecipeError for an end, a beginning or a padding that is no token of the model.

    A model never says a token that it does not have: with such an end, no response would have one.
    """
    for key in _IDS:
        ids = values.get(key)
        for number in ids if isinstance(ids, list) else [ids]:
            if number is None or (number == -1 and key != "eos_token_id"):  # -1: there is none
                continue
            whole = isinstance(number, int) and not isinstance(number, bool)
            if not whole or not 0 <= number < vocabulary:
                raise RecipeError(
                    f"{key}={_shown(ids)} is no token of the model: its vocab_size is {vocabulary}"
                )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < _LARGEST


def _shown(value: object) -> str:
    """A value for a message: short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # of transformers' making
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
