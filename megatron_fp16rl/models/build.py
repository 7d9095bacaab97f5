"""The Hugging Face folder of a recipe's model: given, cached, or a small random one built from a seed."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.models import source
from megatron_fp16rl.models.config import config_of, load_config
from megatron_fp16rl.recipe import BuildModel, Model, RecipeError
from megatron_fp16rl.utils.cache import cache_folder
from megatron_fp16rl.utils.files import new_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PAD, END = "_", "$"


def model_folder(model: Model) -> Path:
    """The folder of a recipe's model. Builds a model that is to be built, and keeps it in the cache.

    Raises RecipeError if it is missing or incomplete.
    """
    if model.build is not None:
        import transformers

        folder = cache_folder("models", model.build.model_dump(), transformers.__version__)
        if not folder.exists():
            build(model.build, folder)
        return folder
    return source.whole_folder(model.path or "")


def model_config(model: Model) -> "PretrainedConfig":
    """The configuration of a recipe's model: of its folder if that is here, else of its shape.

    Raises RecipeError if there is neither, or if the shape is of another model.
    """
    if model.build is not None:
        return built_config(model.build)
    folder = source.local_folder(model.path or "")
    if folder is not None:
        return load_config(folder)
    if model.shape is None:
        raise RecipeError(
            f"model.path = {model.path!r}: there is no Hugging Face folder, nor a model of that name in "
            "the hub's cache, and no model.shape that says what it would hold; give its config.json: "
            "--set model.shape=FILE"
        )
    config = source.shape_config(model.shape)
    source.check_is_its_shape(model)
    return config


def built_config(settings: BuildModel) -> "PretrainedConfig":
    tokens = [PAD, END, *settings.alphabet]
    if len(set(tokens)) != len(tokens):
        raise RecipeError(
            f"model.build.alphabet = {settings.alphabet!r}: characters must differ from one another "
            f"and from {PAD!r} and {END!r}, which are added"
        )
    fixed = {"vocab_size": len(tokens), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    for key in fixed.keys() & settings.config.keys():
        raise RecipeError(f"model.build.config.{key} follows from model.build.alphabet: remove it")
    config = config_of({**settings.config, **fixed}, "model.build.config")
    # Whatever class its folder names, transformers 5.19 reads a Qwen2 model's tokenizer as one of bytes.
    lost = [letter for letter in settings.alphabet if not "!" <= letter <= "~"]
    if config.model_type == "qwen2" and lost:
        raise RecipeError(
            f"model.build.alphabet has {lost[0]!r}, which the tokenizer of a qwen2 model would not read as "
            "one token; give it visible ASCII characters alone, or take model_type: qwen3"
        )
    return config


def build(settings: BuildModel, folder: Path) -> None:
    """Writes model, configuration and tokenizer. The vocabulary is PAD, END and the alphabet."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    config = built_config(settings)
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config)
    with new_folder(folder, keep_old=True) as temporary:
        # transformers 5.19 silently writes on rank 0 alone; the first rank of a node may be another.
        model.should_save_on_this_rank = lambda _: True
        model.save_pretrained(temporary)
        built_tokenizer(settings).save_pretrained(temporary)


def built_tokenizer(settings: BuildModel) -> "PreTrainedTokenizerBase":
    return character_tokenizer([PAD, END, *settings.alphabet])


def character_tokenizer(tokens: list[str]) -> "PreTrainedTokenizerBase":
    """A transformers tokenizer that knows `tokens`, single characters apart from PAD and END."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,  # transformers 5.19 gives a Qwen2 model's tokenizer one of its own otherwise
    )
