"""Whether a recipe's model is one that a run would read as it is meant: looked at before anything is queued."""

from pathlib import Path

from megatron_fp16rl.recipe import Problems, Recipe, RecipeError
from megatron_fp16rl.tasks import templates
from megatron_fp16rl.weights import build, source
from megatron_fp16rl.weights.config import load_config


def check_model(recipe: Recipe, partial: bool = False) -> object | None:
    """Raises RecipeError for what is wrong with a model that is here: by file, key or tensor, and remedy.

    Configuration, tokens, the task's template, stops, the headers of all weights. Returns its tokenizer;
    None of a model that is not here, of which nothing is known.

    partial: for plans, which need no weights and no tokenizer: those that are not here are not missed.
    """
    model = recipe.model
    if model.build is not None:
        build.built_config(model.build)
        tokenizer = build.built_tokenizer(model.build)
        _check_tokenizer(recipe, tokenizer)
        return tokenizer
    folder = source.local_folder(model.path)
    if folder is None:
        return None
    from megatron_fp16rl.weights.check import check_generation, check_tensors
    from megatron_fp16rl.weights.folder import HFFolder
    from megatron_fp16rl.weights.tokenizer import load_tokenizer

    config = load_config(folder)
    source.check_agrees(model, folder)
    check_generation(folder, config)
    tokenizer = None
    if not partial or _has(folder, "tokenizer.json", "tokenizer_config.json"):
        tokenizer = load_tokenizer(folder)
        _check_tokenizer(recipe, tokenizer)
    if not partial or _has(folder, source.SINGLE, source.INDEX):
        check_tensors(HFFolder(folder), config)
    return tokenizer


def _check_tokenizer(recipe: Recipe, tokenizer: object) -> None:
    """Raises RecipeError for a task, stops or a warm start that are not for this tokenizer."""
    if isinstance(recipe.task, Problems):
        templates.check(recipe.task, tokenizer)
    if "" in recipe.rollout.stop:
        raise RecipeError(
            "rollout.stop: '' would end every response after its first token: remove it"
        )
    if recipe.warm_start is not None and tokenizer.eos_token_id is None:
        raise RecipeError(
            "warm_start: the model's tokenizer has no eos_token to end answers with; set it in its "
            "tokenizer_config.json"
        )


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)
