"""Finds a recipe's model on this machine; checks that its files are complete and of the intended model."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.models.config import config_of, read_object
from megatron_fp16rl.recipe import Model, RecipeError
from megatron_fp16rl.utils.files import parse_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightsError(RecipeError):
    """Weights that cannot be read, or that other programs would read otherwise.

    The message names folder or file, tensor and remedy.
    """


def local_folder(path: str) -> Path | None:
    """The Hugging Face folder at `path`, or the main snapshot of that name in the hub's cache, or None.

    Nothing is downloaded. Raises RecipeError if `path` exists and is no such folder.
    """
    try:
        folder = Path(path).expanduser()
        if (folder / "config.json").exists():
            return folder.resolve()
        if folder.exists():
            what = "has no config.json" if folder.is_dir() else "is a file"
            raise RecipeError(f"model.path = {path!r} {what}: it is no Hugging Face folder")
    except (OSError, RuntimeError) as error:  # no permission, a name too long; ~nobody
        raise RecipeError(f"model.path = {path!r} cannot be read: {error}") from None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # a path, not a name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def whole_folder(path: str) -> Path:
    """As `local_folder`. Raises RecipeError if there is none, WeightsError if it lacks weights."""
    folder = local_folder(path)
    if folder is None:
        raise RecipeError(
            f"model.path = {path!r}: there is no Hugging Face folder (no config.json), nor a model of "
            "that name in the hub's cache. Fetch it where there is a network: hf download NAME, or with "
            "--local-dir DIR, which is then the path"
        )
    weight_files(folder)
    return folder


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files of a folder's weights, and its index (tensor -> file) if it has one.

    Raises WeightsError where files are missing, or where other programs would read other files.
    """
    index = _weight_map(folder) if (folder / INDEX).exists() else None
    names = sorted({SINGLE} if index is None else set(index.values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        if index is None and (pickles := sorted(folder.glob("*.bin"))):
            raise WeightsError(
                f"{folder} holds neither {SINGLE} nor {INDEX}: it is not a Hugging Face folder with "
                f"safetensors, and {pickles[0].name} is not read. Save the model again with transformers"
            )
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightsError(
            f"{folder} lacks weights: {', '.join(missing[:3])}{more}. Was a "
            "download cut short? The same hf download fetches what is missing"
        )
    # transformers reads the single file although there is an index. Without an index, SGLang reads every
    # file, but for Mistral's copy of the weights.
    present = {SINGLE} if index is not None else {f.name for f in folder.glob("*.safetensors")}
    spare = {name for name in present if (folder / name).exists()}
    if others := sorted(spare - {*names, "consolidated.safetensors"}):
        raise WeightsError(
            f"{folder} holds {', '.join(others[:3])} beside {INDEX if index else SINGLE}: servers and "
            "transformers would read other weights. Move away what is not of the model"
        )
    return names, index


def _weight_map(folder: Path) -> dict[str, str]:
    file = folder / INDEX
    try:
        files = read_object(file).get("weight_map")
    except RecipeError as error:
        raise WeightsError(str(error)) from None
    if not isinstance(files, dict) or not files:
        raise WeightsError(f"{file} has no weight_map, which says what file each tensor is in")
    for tensor, name in files.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{file}: {tensor} is in {name!r}, which is no file of this folder")
    return files


def check_is_its_shape(model: Model) -> None:
    """Raises RecipeError if the shape is known to be of another model than `path` names.

    Else a shipped recipe that is given another model's name would be planned as its own model.
    """
    if model.shape is None or model.path is None:
        return
    of, right = name_in(Path(model.shape)), shape_beside(model.shape, model.path)
    if of not in (None, model.path) and right is not None:
        raise RecipeError(
            f"model.path = {model.path!r}, but model.shape = {model.shape!r} is that of {of}; say "
            f"--set model.shape={right}"
        )


def shape_beside(shape: str, name: str) -> Path | None:
    """The shape of the model of that name: this file or one beside it; None if there is none."""
    files = [Path(shape), *sorted(Path(shape).parent.glob("*.json"))]
    return next((file for file in files if name_in(file) == name), None)


def name_in(file: Path) -> str | None:
    """The model's name in a config.json; None if it has none, or the file is something else."""
    try:
        return parse_json(file.read_bytes()).get("_name_or_path")
    except (OSError, ValueError):
        return None


def shape_config(shape: str) -> "PretrainedConfig":
    """The transformers configuration in a shape's file. Raises RecipeError."""
    where = f"model.shape = {shape!r}"
    try:
        values = parse_json(Path(shape).read_bytes())
    except FileNotFoundError:
        raise RecipeError(f"{where}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where} cannot be read: {error}") from None
    return config_of(values, where)
