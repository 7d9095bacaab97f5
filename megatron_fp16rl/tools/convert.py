"""A Megatron-core checkpoint, or MXFP4 weights, to a Hugging Face folder, in one process."""

from collections.abc import Iterator
from pathlib import Path

import torch

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
from megatron_fp16rl.models.folder import HFFolder, write_folder
from megatron_fp16rl.models.source import WeightsError
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


def from_mxfp4(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes a folder with MXFP4 weights as one of a half dtype, one tensor at a time.

    Raises WeightsError for numbers that the dtype cannot hold, and for a folder without such weights.
    """
    weights = HFFolder(source)
    if not weights.packed:
        raise WeightsError(f"{source} has no MXFP4 weights (tensors NAME_blocks and NAME_scales)")

    def cast() -> Iterator[tuple[str, torch.Tensor]]:
        for name in weights.names():
            tensor = weights.read(name).to(dtype)
            if not tensor.isfinite().all():
                raise WeightsError(f"{weights.where(name)} holds numbers that {dtype} cannot")
            yield name, tensor

    write_folder(folder, source, str(dtype).removeprefix("torch."), cast())
