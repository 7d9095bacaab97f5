"""A model's tokenizer: whole, and of this model."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.models.config import damage, read_object
from megatron_fp16rl.recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model's folder. No code of the folder is run.

    Raises RecipeError, naming the file, if it cannot be read, or has tokens that the model has not: with
    tensor parallelism these would silently be zero vectors, for learner and servers alike.
    """
    from transformers import AutoTokenizer

    for name in _JSON:
        if (folder / name).exists():
            read_object(folder / name)
    files = [file for pattern in _VOCABULARIES for file in folder.glob(pattern)]
    if not files:  # transformers would make an empty tokenizer of some classes
        raise RecipeError(
            f"{folder} has no tokenizer (tokenizer.json): copy its files from the model that this one was "
            "made of"
        )
    for file in files:
        if reason := damage(file):
            raise RecipeError(f"{file} {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any type: transformers reads files in many ways
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs code of the folder (auto_map), and none is ever run"
        raise RecipeError(f"{folder}: its tokenizer cannot be read: {reason}") from error
    _check_ids(tokenizer, folder)
    return tokenizer


def _check_ids(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Raises RecipeError for tokens without a row in the model's embedding.

    Added tokens count as well: a problem may hold their text. That the model has more tokens is usual.
    """
    rows = read_object(folder / "config.json").get("vocab_size")
    if not isinstance(rows, int):
        return  # of a family that nests its text model's configuration
    over = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if over:
        number, token = over[0]
        more = f" and {len(over) - 1} more" if len(over) > 1 else ""
        raise RecipeError(
            f"{folder}: the tokenizer has {token!r} with id {number}{more}, but the model's vocab_size is "
            f"{rows} (config.json). Remove it from the tokenizer's added tokens, or give the model its row: "
            "model.resize_token_embeddings of transformers, then train that"
        )
