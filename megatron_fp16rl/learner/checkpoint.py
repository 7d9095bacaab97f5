"""Saves and restores a learner: Megatron-core's distributed checkpoints, readable at any layout.

Tensors are Megatron-core's (`dist_checkpointing`, format torch_dist): parameters under Megatron's names,
and for each of them `optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.<name>`, in the shape of the
parameter whichever optimizer kept them. So a checkpoint can be read at another layout, and with or
without the distributed optimizer. With LoRA only the adapters have optimizer state; the frozen weights
are saved too, so that a checkpoint needs no other folder.

Of Megatron's own optimizer state nothing else is used: in 0.19.2 it has one loss scale for dense
parameters and one for experts, one step for all parameters, and another format for each optimizer.
What is no tensor goes to state.json, random number generators go to rng/.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.utils.serialization import config

from megatron_fp16rl.learner import checkpoint_files, rng
from megatron_fp16rl.learner.checkpoint_files import (
    DESCRIPTION,
    STATE,
    Checkpoint,
    CheckpointError,
    Digests,
)
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.learner.model import Model, Shard
from megatron_fp16rl.learner.optimizer import STATE_NAMES, ParameterState
from megatron_fp16rl.models.folder import copy_description
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import Layout

T = TypeVar("T")
ShardedTensors = dict[
    str, ShardedTensor
]  # tensors to save or load; the keys are for this process only


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    step       the next step; with the recipe's seed it gives the position in the data
    version    of the weights that the servers were last given
    """

    step: int
    version: int
    tokens: int = 0
    accuracy_before: float | None = None


def save(
    learner: Learner,
    folder: Path,
    progress: Progress,
    hf_dir: Path,
    save_more: Callable[[Path], None] = lambda _: None,
) -> Checkpoint:
    """Writes `folder`/step_<progress.step>, whole or not at all. Collective over the world.

    hf_dir: the Hugging Face folder whose configuration and tokenizer are copied into it. save_more: is
    called on every rank with the folder, to add files to it.
    """
    temporary = write(learner, folder, progress, hf_dir, save_more)
    names = share_of_files(learner.world, temporary)
    digests = {name: checkpoint_files.digest(temporary / name) for name in names}
    return commit(learner.world, temporary, progress.step, digests)


def write(
    learner: Learner,
    folder: Path,
    progress: Progress,
    hf_dir: Path,
    save_more: Callable[[Path], None],
    files: FileSystem | None = None,
) -> Path:
    """Writes all files of a checkpoint into a new folder, which is returned; `commit` makes it one. Collective.

    files: where the ranks' tensors go instead; see background.py.
    """
    world = learner.world
    scalers = world.gather(learner.scaler and learner.scaler.state_dict())
    if any(scaler != scalers[0] for scaler in scalers):
        raise CheckpointError(f"the loss scalers of the ranks differ: {scalers}")
    state = {
        "progress": asdict(progress),
        "layout": _layout(learner),
        "scaler": scalers[0],
        "schedule": {"updates": learner.optimizer.schedule.num_steps},
        "adam_steps": _adam_steps(learner),
        "lora": learner.settings.lora and learner.settings.lora.model_dump(),
    }
    temporary = checkpoint_files.begin(folder, progress.step) if world.is_rank0 else folder
    temporary = world.broadcast_from_rank0(temporary)
    tensors = _Tensors(learner.model)
    request = {**tensors.owned(), **_optimizer_tensors(learner, tensors, with_values=True)}
    dist_checkpointing.save(request, str(temporary), _InProcess(files))
    rng.save(temporary / "rng", world.rank)
    save_more(temporary)
    if world.is_rank0:
        (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")  # synced with all files
        dtype = str(learner.model.dtype).removeprefix("torch.")
        copy_description(hf_dir, temporary / DESCRIPTION, dtype)
    dist.barrier()  # every rank has written its files
    return temporary


def share_of_files(world: World, folder: Path) -> list[str]:
    """The files that this rank checksums: every file is one rank's. Collective."""
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    return world.broadcast_from_rank0(names)[world.rank :: world.size]


def commit(world: World, temporary: Path, step: int, digests: Digests) -> Checkpoint:
    """Makes a checkpoint of a folder. Collective. digests: of this rank's files, which are synced to disk."""
    digests = _union(world, digests)
    if world.is_rank0:
        checkpoint_files.commit(temporary, step, digests)
    dist.barrier()
    return Checkpoint(temporary.parent / f"step_{step}")


def load(learner: Learner, checkpoint: Checkpoint) -> Progress:
    """Restores a learner, whatever layout it was saved at. Collective over the world.

    At the same layout random number generators are restored, too; at another they keep their seed.
    Raises Damaged if the files are not what was written, and CheckpointError.
    """
    world, model = learner.world, learner.model
    _verify(checkpoint, world)
    state = checkpoint.state()
    checkpoint.check_same_model(learner.hf_dir, learner.settings.lora)
    tensors = _Tensors(model)
    frozen = {shard.name: tensors.sharding[id(shard.parameter)] for shard in model.frozen}
    adam = _optimizer_tensors(learner, tensors, with_values=False)
    loaded = dist_checkpointing.load({**tensors.buffers(), **frozen, **adam}, str(checkpoint.path))
    tensors.restore_buffers(loaded)
    for shard in model.frozen:
        shard.parameter.data.copy_(loaded.pop(shard.name))
    _restore_adam(learner, tensors, loaded, state["adam_steps"])
    learner.optimizer.schedule.step(increment=state["schedule"]["updates"])
    if learner.scaler is not None and state["scaler"] is not None:
        learner.scaler.load_state_dict(state["scaler"])
    if state["layout"] == _layout(learner):
        rng.load(checkpoint.path / "rng", world.rank)
    return Progress(**state["progress"])


def load_model(model: Model, checkpoint: Checkpoint) -> None:
    """Loads a checkpoint's parameters, nothing else, in a world of one."""
    _verify(checkpoint, model.world)
    tensors = _Tensors(model)
    loaded = dist_checkpointing.load(tensors.owned(), str(checkpoint.path))
    tensors.restore_buffers(loaded)
    for shard in tensors.parameters:
        shard.parameter.data.copy_(loaded[shard.name])


class _Tensors:
    """This rank's tensors as parts of the global ones.

    sharding  Megatron's description of each tensor, by the id of the tensor
    owners    the data-parallel rank that reads and writes the state of each parameter: equal shares
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.parameters = [*model.weights, *model.adapters]
        self.sharding: dict[int, ShardedTensor] = {}
        for gpt in model.gpt_models:
            for sharded in gpt.sharded_state_dict().values():
                if not isinstance(sharded, ShardedObject):  # Transformer Engine's, for FP8
                    self.sharding[id(sharded.data)] = sharded
        self.owners: dict[str, int] = {}
        totals: dict[bool, list[int]] = {}
        for shard in self.parameters:
            shares = totals.setdefault(shard.is_expert, [0] * model.replicas_of(shard).size)
            self.owners[shard.name] = shares.index(min(shares))
            shares[self.owners[shard.name]] += shard.parameter.numel()

    def is_owner(self, shard: Shard) -> bool:
        return self.owners[shard.name] == self.model.replicas_of(shard).rank

    def description(self, shard: Shard) -> ShardedTensor:
        """Of a parameter as the only copy among data-parallel ranks."""
        sharded = self.sharding[id(shard.parameter)]
        return replace(sharded, replica_id=(*sharded.replica_id[:2], 0))

    def owned(self) -> ShardedTensors:
        """Buffers, and the parameters that this rank owns."""
        owned = {s.name: self.description(s) for s in self.parameters if self.is_owner(s)}
        return {**self.buffers(), **owned}

    def buffers(self) -> ShardedTensors:
        """All that is no parameter, on every rank that has it."""
        parameters = {id(shard.parameter) for shard in self.parameters}
        return {
            f"buffer {sharded.key} {sharded.global_offset}": sharded
            for tensor, sharded in self.sharding.items()
            if tensor not in parameters
        }

    def restore_buffers(self, loaded: dict[str, torch.Tensor]) -> None:
        for name, sharded in self.buffers().items():
            sharded.data.copy_(loaded[name])


def _optimizer_tensors(learner: Learner, tensors: _Tensors, with_values: bool) -> ShardedTensors:
    """The optimizer's state of the parameters that this rank owns, in the parameters' shape.

    with_values: gathered from the data-parallel ranks that hold parts of it.
    """
    request = {}
    for shard in learner.model.trained:
        state = learner.optimizer.state_of(shard.parameter)
        for name in STATE_NAMES:
            # Collective over the replicas: the ranks that do not own it take part.
            full = _gather_state(tensors, shard, state, name) if with_values else None
            if not tensors.is_owner(shard):
                continue
            if full is None:
                full = torch.zeros(shard.parameter.shape)
            base, prefix = tensors.description(shard), f"optimizer.state.{name}"
            request[f"{name} {shard.name}"] = make_sharded_optimizer_tensor(base, full, prefix)
    return request


def _gather_state(
    tensors: _Tensors, shard: Shard, state: ParameterState, name: str
) -> torch.Tensor | None:
    """One state tensor of a parameter shard, complete, on its owner.

    On the host where it had to be put together: all of them exist at once until they are written.
    """
    replicas, shape = tensors.model.replicas_of(shard), shard.parameter.shape
    is_owner, tensor = tensors.is_owner(shard), state.tensors[name]
    if not tensors.model.distributed_optimizer or replicas.size == 1:
        return tensor.view(shape) if is_owner else None
    full = torch.zeros(shard.parameter.numel(), device=tensor.device)
    full[state.span] = tensor
    # Each element is on one rank. Summed as integers, its bits stay as they are (-0.0 too).
    owner = tensors.owners[shard.name]
    dist.reduce(full.view(torch.int32), group=replicas.group, group_dst=owner)
    return full.view(shape).cpu() if is_owner else None


@torch.no_grad()
def _restore_adam(
    learner: Learner, tensors: _Tensors, loaded: dict[str, torch.Tensor], steps: dict[str, int]
) -> None:
    """Gives every rank its part of what the owners read; parameters are cast from fp32_param."""
    model = learner.model
    for shard in model.trained:
        replicas, owner = model.replicas_of(shard), tensors.owners[shard.name]
        state = learner.optimizer.state_of(shard.parameter)
        for name in STATE_NAMES:
            full = loaded.pop(f"{name} {shard.name}", None)
            if full is None:
                full = torch.empty_like(shard.parameter, dtype=torch.float32)
            full = full.to(shard.parameter.device)
            if replicas.size > 1:
                full = full.contiguous()
                dist.broadcast(full, group=replicas.group, group_src=owner)
            state.tensors[name].copy_(full.view(-1)[state.span])
            if name == "fp32_param":
                shard.parameter.copy_(full)
        learner.optimizer.restore_step(shard.parameter, steps[model.canonical_name(shard.name)])


def _adam_steps(learner: Learner) -> dict[str, int]:
    """Adam's count of updates of every parameter of the model."""
    local = {}
    for shard in learner.model.trained:
        state = learner.optimizer.state_of(shard.parameter)
        if state.span.start != state.span.stop:
            local[learner.model.canonical_name(shard.name)] = state.step
    return _union(learner.world, local)


class _InProcess(TorchDistSaveShardedStrategy):
    """Megatron-core's format, written by the ranks themselves.

    Megatron's own writer (0.19.2) forks the rank and starts a manager, which outlives
    a rank that is killed; and a rank whose disk is full leaves the others waiting.
    """

    def __init__(self, files: FileSystem | None) -> None:
        super().__init__()
        self.files = files or FileSystem()

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        writer = FileSystemWriter(checkpoint_dir, sync_files=False)  # `digest` syncs
        writer.fs = self.files
        # torch never reads the sums that it would add to each tensor, and they cost a third of its time.
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            torch.distributed.checkpoint.save(
                mcore_to_pyt_state_dict(by_key, False),
                storage_writer=writer,
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )


def _union(world: World, values: dict[str, T]) -> dict[str, T]:
    return {name: value for local in world.gather(values) for name, value in local.items()}


def _verify(checkpoint: Checkpoint, world: World) -> None:
    """Compares all files with the manifest; each rank reads some of them. Raises CheckpointError."""
    names: list[str] = []
    with contextlib.suppress(CheckpointError):  # `faults` reports it
        names = sorted(checkpoint.files())[world.rank :: world.size]
    faults = world.gather(checkpoint.faults(names))
    if distinct := list(dict.fromkeys(itertools.chain(*faults))):
        raise checkpoint_files.refusal(checkpoint, distinct)
    checkpoint.check_index()


def _layout(learner: Learner) -> dict[str, Any]:
    return learner.settings.model_dump(include=set(Layout.model_fields))
