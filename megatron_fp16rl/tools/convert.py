"""Megatron-core checkpoints to Hugging Face folders and back, in one process."""

from pathlib import Path

from megatron_fp16rl.learner import checkpoint as checkpointing
from megatron_fp16rl.learner.checkpoint_files import (
    DESCRIPTION,
    MANIFEST,
    Checkpoint,
    CheckpointError,
)
from megatron_fp16rl.learner.export import export_weights
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.models.check import check_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder, write_folder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import initialize, shutdown, single_process_environment
from megatron_fp16rl.recipe import TORCH_DTYPES, Layout, Lora
from megatron_fp16rl.utils.files import read_json
from megatron_fp16rl.utils.processes import free_port


def to_hugging_face(path: Path, folder: Path) -> None:
    """Writes the parameters of a checkpoint, saved at whatever layout, as a Hugging Face folder.

    Adapters are merged into the weights.
    The whole model must fit this machine's memory three times. Raises CheckpointError.
    """
    found = Checkpoint(path.resolve())
    if not (found.path / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is no checkpoint: it has no {MANIFEST}; name e.g. runs/NAME/checkpoints/latest"
        )
    like = found.path / DESCRIPTION
    if faults := found.faults():
        raise CheckpointError("; ".join(faults[:3]))
    dtype = read_json(like / "config.json")["dtype"]
    ours = next(ours for ours, theirs in TORCH_DTYPES.items() if theirs == dtype)
    model = _model(like, ours, found.lora())
    checkpointing.load_model(model, found)
    write_folder(folder, like, dtype, export_weights(model))
    shutdown()


def to_checkpoint(hf: Path, folder: Path, dtype: str) -> Path:
    """Writes a Hugging Face folder's weights as folder/step_0, parameters only; returns its path.

    Raises RecipeError, or WeightsError, for a folder that is no model or no whole one.
    """
    check_folder(hf)
    model = _model(hf, dtype)
    model.load(HFFolder(hf))
    made = checkpointing.save_model(model, folder, hf)
    shutdown()
    return made.path


def _model(folder: Path, dtype: str, lora: Lora | None = None) -> Model:
    single_process_environment(free_port("127.0.0.1"))
    world = initialize(Layout(), seed=0)
    return Model(describe(load_config(folder), world.layout), dtype, world, lora=lora)
