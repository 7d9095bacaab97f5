"""A Megatron-core checkpoint to a Hugging Face folder, in one process."""

from pathlib import Path

from megatron_fp16rl.learner import checkpoint as checkpointing
from megatron_fp16rl.learner.checkpoint_files import (
    DESCRIPTION,
    MANIFEST,
    Checkpoint,
    CheckpointError,
)
from megatron_fp16rl.learner.export import Export
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import write_folder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import initialize, shutdown, single_process_environment
from megatron_fp16rl.recipe import TORCH_DTYPES, Layout
from megatron_fp16rl.utils.files import read_json
from megatron_fp16rl.utils.processes import free_port


def to_hugging_face(path: Path, folder: Path) -> None:
    """Writes the parameters of a checkpoint, saved at whatever layout, as a Hugging Face folder.

    Adapters are merged into the weights. The whole model must fit this machine's memory three times.
    Raises CheckpointError.
    """
    checkpoint = Checkpoint(path.resolve())
    if not (checkpoint.path / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is no checkpoint: it has no {MANIFEST}; name e.g. runs/NAME/checkpoints/latest"
        )
    if faults := checkpoint.faults():
        raise CheckpointError("; ".join(faults[:3]))
    like = checkpoint.path / DESCRIPTION
    stored = read_json(like / "config.json")["dtype"]
    dtype = next(ours for ours, theirs in TORCH_DTYPES.items() if theirs == stored)
    single_process_environment(free_port("127.0.0.1"))
    world = initialize(Layout(), seed=0)
    spec = describe(load_config(like), world.layout)
    model = Model(spec, dtype, world, lora=checkpoint.lora())
    checkpointing.load_model(model, checkpoint)
    write_folder(folder, like, stored, Export(model).whole())
    shutdown()
