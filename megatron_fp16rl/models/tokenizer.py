"""A model's tokenizer: whole, and of this model."""

from pathlib import Path

from megatron_fp16rl.models.config import damage, read_object
from megatron_fp16rl.recipe import RecipeError

_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)


def load_tokenizer(folder: Path) -> object:
    """The transformers tokenizer of a model's folder. No code of the folder is run.

    Raises RecipeError, naming the file, if it cannot be read, or has tokens that the model has not: with
    tensor parallelism these would silently be zero vectors, to learner and servers alike.
    """
    from transformers import AutoTokenizer

    for name in _JSON:
        if (folder / name).exists():
            read_object(folder / name)
    found = [file for pattern in _VOCABULARIES for file in folder.glob(pattern)]
    if not found:  # transformers would make an empty tokenizer of some classes
        raise RecipeError(
            f"{folder} has no tokenizer (tokenizer.json): copy its files from the model that this one was "
            "made of"
        )
    for file in found:
        if said := damage(file):
            raise RecipeError(f"{file} {said}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever transformers says of files that are no tokenizer
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs code of the folder (auto_map), and none is ever run"
        raise RecipeError(f"{folder}: its tokenizer cannot be read: {reason}") from error
    _check_ids(tokenizer, folder)
    return tokenizer


def _check_ids(tokenizer: object, folder: Path) -> None:
    """Raises RecipeError for tokens without a row in the model's embedding.

    Every token counts: an added one is what its text becomes wherever a problem has it. That the model
    has more is usual: tables are padded.
    """
    rows = read_object(folder / "config.json").get("vocab_size")
    if not isinstance(rows, int):
        return  # of a family whose text model is described further inside
    over = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if over:
        number, token = over[0]
        more = f" and {len(over) - 1} more" if len(over) > 1 else ""
        raise RecipeError(
            f"{folder}: the tokenizer has {token!r} with id {number}{more}, but the model's vocab_size is "
            f"{rows} (config.json). Remove it from the tokenizer's added tokens, or give the model its row: "
            "model.resize_token_embeddings of transformers, then train that"
        )
