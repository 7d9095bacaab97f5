"""Checks that a folder holds the model that its config.json describes, before anything is queued.

Only headers are read, and of a tied model its embedding and output layer.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_fp16rl.models.config import check_ids, load_config, read_object
from megatron_fp16rl.models.families import family_named
from megatron_fp16rl.models.folder import EMBEDDING, OUTPUT, HFFolder, is_spare
from megatron_fp16rl.models.source import WeightsError
from megatron_fp16rl.models.spec import check_served
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPES = ("F64", "F32", "F16", "BF16")


def check_folder(folder: Path) -> None:
    """Raises RecipeError for a configuration, WeightsError for weights that no learner can be made of."""
    config = load_config(folder)
    check_generation(folder, config)
    check_tensors(HFFolder(folder), config)


def check_served_folder(folder: Path) -> None:
    """As `check_folder`, of a model that is only served. What no learner takes is left to SGLang, but for
    files that cannot be read.
    """
    values = read_object(folder / "config.json")
    family = family_named(values.get("model_type"), values.get("architectures"))
    if family is not None and not values.get("quantization_config"):
        check_folder(folder)
        check_served(load_config(folder))
    else:
        HFFolder(folder)


def check_generation(folder: Path, config: "PretrainedConfig") -> None:
    """Raises RecipeError for a generation_config.json that ends responses with a token of none."""
    file = folder / "generation_config.json"
    if file.exists():
        values = read_object(file)
        try:
            check_ids(values, config.vocab_size)
        except RecipeError as error:
            raise RecipeError(f"{file}: {error}") from None


def check_tensors(folder: HFFolder, config: "PretrainedConfig") -> None:
    """Raises WeightsError for tensors that are missing, left over, quantised or of another shape."""
    shapes = parameters(config)
    for name, entry in folder.entries.items():
        if entry.dtype not in _DTYPES:
            raise WeightsError(
                f"{folder.where(name)} is {entry.dtype}: quantised weights are not read. Convert them to "
                "bf16 or fp16 first"
            )
    missing = [name for name in shapes if name not in folder.entries]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        remedy = "save the model again with transformers' AutoModelForCausalLM"
        if missing == [OUTPUT]:
            remedy = "set tie_word_embeddings to true there if it is tied to the embedding"
        raise WeightsError(
            f"{folder.path} has no tensor {missing[0]}{more} that its config.json describes: {remedy}"
        )
    mtp_layers = getattr(config, "num_nextn_predict_layers", None) or 0
    about = (config.num_hidden_layers, mtp_layers, config.tie_word_embeddings)
    left = [name for name in folder.entries if name not in shapes and not is_spare(name, *about)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise WeightsError(
            f"{folder.where(min(left))}{more}: no parameter of this {config.model_type} model takes it. "
            "Is config.json that of another model?"
        )
    for name, shape in shapes.items():
        actual = folder.entries[name].shape
        if actual != tuple(shape):
            remedy = "one of the two is of another model"
            if name in (EMBEDDING, OUTPUT) and actual[1:] == tuple(shape)[1:]:
                remedy = f"if the weights are right, set vocab_size to {actual[0]} there"
            raise WeightsError(
                f"{folder.where(name)} is {list(actual)}, but config.json asks for {list(shape)}: {remedy}"
            )
    if config.tie_word_embeddings:
        folder.check_tied()


def parameters(config: "PretrainedConfig") -> dict[str, torch.Size]:
    """Names and shapes of a model's tensors in a Hugging Face folder, as transformers writes them.

    Raises RecipeError where transformers builds no model of the configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # of any type: values that contradict each other
        raise RecipeError(
            f"transformers builds no model of this {config.model_type} config.json: {error}"
        ) from error
    saved = revert_weight_conversion(model, model.state_dict())
    tied = {OUTPUT} if config.tie_word_embeddings else set()
    return {name: tensor.shape for name, tensor in saved.items() if name not in tied}
