"""Saving and restoring a learner: Megatron-core's distributed checkpoints, at any layout.

The tensors are Megatron-core's (`dist_checkpointing`, format torch_dist): parameters under
Megatron's names, and for each of them `optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.<name>`, in
the shape of the parameter whichever optimizer kept them. So a checkpoint can be read at another
layout, and with or without the distributed optimizer. Of a model with adapters only these have optimizer
state; its frozen weights are kept too, so that a checkpoint needs no other folder.

Of Megatron's own optimizer state nothing else is used: in 0.16.1 it has one loss scale for dense
parameters and one for experts, one step for all parameters, and another format for each optimizer.
What is not a tensor is JSON (state.json) and what differs from rank to rank is rng/.
"""

import contextlib
import itertools
import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter

from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.learner.checkpoint_files import Checkpoint, CheckpointError, Digests
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.learner.model import Model, Piece
from megatron_fp16rl.learner.optimizer import STATE_NAMES, ParameterState
from megatron_fp16rl.models.folder import copy_description
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import Layout, Lora
from megatron_fp16rl.utils.files import read_json, write_json

STATE, DESCRIPTION = "state.json", "hf"
_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float16", "bfloat16", "float32", "int64"),
    "pathlib": ("PosixPath",),
}


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


def save(learner: Learner, folder: Path, progress: Progress, like: Path) -> Checkpoint:
    """Writes `folder`/step_<progress.step>, whole or not at all. Collective over the world.

    like: the Hugging Face folder whose configuration and tokenizer go along.
    """
    world = learner.world
    state = {
        "progress": asdict(progress),
        "layout": _layout(learner),
        "scaler": _same_everywhere(learner.scaler and learner.scaler.state_dict(), world),
        "schedule": {"updates": learner.optimizer.schedule.num_steps},
        "adam_steps": _adam_steps(learner),
        "lora": learner.settings.lora and learner.settings.lora.model_dump(),
    }
    temporary = _begin(world, folder, progress.step)
    tensors = {**_model_request(learner.model), **_adam_request(learner, filled=True)}
    dist_checkpointing.save(tensors, str(temporary), _InProcess("torch_dist", 1))
    if world.is_rank0:
        write_json(temporary / STATE, state)
    _save_rng(temporary / "rng", world.rank)
    return _commit(learner.model, temporary, progress.step, like)


def save_model(model: Model, folder: Path, like: Path) -> Checkpoint:
    """Writes `folder`/step_0 with parameters only. Collective over the world."""
    temporary = _begin(model.world, folder, 0)
    tensors = _model_request(model)
    dist_checkpointing.save(tensors, str(temporary), _InProcess("torch_dist", 1))
    return _commit(model, temporary, 0, like)


def load(learner: Learner, checkpoint: Checkpoint) -> Progress:
    """Restores a learner, whatever layout it was saved at. Collective over the world.

    Ranks go on with their random numbers if the layout is the same; otherwise these start anew from
    the seed. Raises Damaged if it is not what was written, and CheckpointError.
    """
    world = learner.world
    _verify(checkpoint, world)
    state = _read_state(checkpoint)
    _check_model(checkpoint, learner, state)
    request = {
        **_buffer_request(learner.model),
        **_frozen_request(learner.model),
        **_adam_request(learner, filled=False),
    }
    loaded = dist_checkpointing.load(request, str(checkpoint.path))
    _restore_buffers(learner.model, loaded)
    for piece in itertools.chain(*learner.model.frozen):
        piece.parameter.data.copy_(loaded.pop(piece.name))
    _restore_adam(learner, loaded, state["adam_steps"])
    learner.optimizer.schedule.step(increment=state["schedule"]["updates"])
    if learner.scaler is not None and state["scaler"] is not None:
        learner.scaler.load_state_dict(state["scaler"])
    if state["layout"] == _layout(learner):
        _load_rng(checkpoint.path / "rng", world.rank)
    return Progress(**state["progress"])


def adapters_of(checkpoint: Checkpoint) -> Lora | None:
    """The LoRA settings that a checkpoint was made with: a model must have them to read it."""
    file = checkpoint.path / STATE
    settings = read_json(file).get("lora") if file.exists() else None
    return settings and Lora.model_validate(settings)


def load_model(model: Model, checkpoint: Checkpoint) -> None:
    """Takes a checkpoint's parameters, nothing else. Collective over the world."""
    _verify(checkpoint, model.world)
    loaded = dist_checkpointing.load(_model_request(model), str(checkpoint.path))
    _restore_buffers(model, loaded)
    for piece in _parameters(model):
        piece.parameter.data.copy_(loaded[piece.name])


# Which tensors, and how they lie in the whole


def _sharding(model: Model) -> dict[int, object]:
    """Megatron's description of each of this rank's tensors, by the id of the tensor."""
    described = {}
    for core in model.cores:
        for sharded in core.sharded_state_dict().values():
            if not isinstance(sharded, ShardedObject):  # Transformer Engine's, for FP8
                described[id(sharded.data)] = sharded
    return described


def _parameters(model: Model) -> Iterator[Piece]:
    return itertools.chain(*model.pieces, *model.adapters)


def _owners(model: Model) -> dict[str, int]:
    """The data-parallel rank that reads and writes the state of each parameter: equal shares."""
    totals: dict[bool, list[int]] = {}
    owners = {}
    for piece in _parameters(model):
        shares = totals.setdefault(piece.is_expert, [0] * model.replicas_of(piece).size)
        owners[piece.name] = shares.index(min(shares))
        shares[owners[piece.name]] += piece.parameter.numel()
    return owners


def _owned_by(sharded: object) -> object:
    """The description of a tensor as its only copy among data-parallel ranks."""
    return replace(sharded, replica_id=(*sharded.replica_id[:2], 0))


def _model_request(model: Model) -> dict[str, object]:
    """Parameters that this rank owns, and buffers."""
    sharding, owners = _sharding(model), _owners(model)
    mine = {
        piece.name: _owned_by(sharding[id(piece.parameter)])
        for piece in _parameters(model)
        if owners[piece.name] == model.replicas_of(piece).rank
    }
    return {**_buffer_request(model), **mine}


def _buffer_request(model: Model) -> dict[str, object]:
    parameters = {id(piece.parameter) for piece in _parameters(model)}
    return {
        f"buffer {sharded.key} {sharded.global_offset}": sharded
        for tensor, sharded in _sharding(model).items()
        if tensor not in parameters
    }


def _frozen_request(model: Model) -> dict[str, object]:
    """Weights without optimizer state, on every rank that has them."""
    sharding = _sharding(model)
    frozen = itertools.chain(*model.frozen)
    return {piece.name: sharding[id(piece.parameter)] for piece in frozen}


def _restore_buffers(model: Model, loaded: dict[str, torch.Tensor]) -> None:
    for name, sharded in _buffer_request(model).items():
        sharded.data.copy_(loaded[name])


def _adam_request(learner: Learner, filled: bool) -> dict[str, object]:
    """The optimizer's state of the parameters that this rank owns, in the parameters' shape.

    filled: with its values, which are gathered from the data-parallel ranks that have parts of it.
    """
    model = learner.model
    sharding, owners = _sharding(model), _owners(model)
    request = {}
    for piece in itertools.chain(*model.trained):
        state = learner.optimizer.state_of(piece.parameter)
        mine = owners[piece.name] == model.replicas_of(piece).rank
        for name in STATE_NAMES:
            whole = _assemble(model, piece, state, name, owners[piece.name]) if filled else None
            if mine:
                if whole is None:
                    whole = torch.zeros(piece.parameter.shape)
                base = _owned_by(sharding[id(piece.parameter)])
                request[f"{name} {piece.name}"] = make_sharded_optimizer_tensor(
                    base, whole, f"optimizer.state.{name}"
                )
    return request


def _assemble(
    model: Model, piece: Piece, state: ParameterState, name: str, owner: int
) -> torch.Tensor | None:
    """The whole of a parameter's state, on its owner.

    On the host where it had to be put together: all of them are there at once until they are written.
    """
    replicas, shape = model.replicas_of(piece), piece.parameter.shape
    tensor = state.tensors[name]
    if not model.distributed_optimizer or replicas.size == 1:
        return tensor.view(shape) if replicas.rank == owner else None
    whole = torch.zeros(piece.parameter.numel(), device=tensor.device)
    whole[state.span] = tensor
    # Each element is with one rank. Summed as integers, its bits stay as they are (-0.0 too).
    dist.reduce(whole.view(torch.int32), group=replicas.group, group_dst=owner)
    return whole.view(shape).cpu() if replicas.rank == owner else None


@torch.no_grad()
def _restore_adam(learner: Learner, loaded: dict[str, torch.Tensor], steps: dict[str, int]) -> None:
    """Gives every rank its part of what the owners read, and parameters made from fp32_param."""
    model = learner.model
    owners = _owners(model)
    for piece in itertools.chain(*model.trained):
        replicas, owner = model.replicas_of(piece), owners[piece.name]
        state = learner.optimizer.state_of(piece.parameter)
        for name in STATE_NAMES:
            whole = loaded.pop(f"{name} {piece.name}", None)
            if whole is None:
                whole = torch.empty_like(piece.parameter, dtype=torch.float32)
            whole = whole.to(piece.parameter.device)
            if replicas.size > 1:
                whole = whole.contiguous()
                dist.broadcast(whole, group=replicas.group, group_src=owner)
            state.tensors[name].copy_(whole.view(-1)[state.span])
            if name == "fp32_param":
                piece.parameter.copy_(whole)
        learner.optimizer.restore_step(piece.parameter, steps[model.whole_name(piece)])


def _adam_steps(learner: Learner) -> dict[str, int]:
    """Adam's count of updates of every parameter of the model."""
    model = learner.model
    mine = {}
    for piece in itertools.chain(*model.trained):
        state = learner.optimizer.state_of(piece.parameter)
        if state.span.start != state.span.stop:
            mine[model.whole_name(piece)] = state.step
    everywhere: list[dict[str, int] | None] = [None] * model.world.size
    dist.all_gather_object(everywhere, mine)
    return {name: step for rank in everywhere for name, step in rank.items()}


# Files


class _InProcess(SaveShardedStrategy):
    """Megatron-core's format, written by the ranks themselves.

    Megatron's own writer (0.16.1) forks two processes a rank and starts a manager, which outlives
    a rank that is killed; and a rank whose disk is full leaves the others waiting.
    """

    can_handle_sharded_objects = True

    def save(self, sharded_state_dict: dict[str, object], checkpoint_dir: Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=False),  # `digest` syncs
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _begin(world: World, folder: Path, step: int) -> Path:
    return Path(
        world.broadcast_from_rank0(
            str(checkpoint_files.begin(folder, step)) if world.is_rank0 else None
        )
    )


def _commit(model: Model, temporary: Path, step: int, like: Path) -> Checkpoint:
    """Adds what the model is, sums all files up, and makes a checkpoint of the folder."""
    world = model.world
    if world.is_rank0:
        dtype = str(model.dtype).removeprefix("torch.")
        copy_description(like, temporary / DESCRIPTION, dtype)
    dist.barrier()
    files = _digests(world, temporary)
    if world.is_rank0:
        checkpoint_files.commit(temporary, step, files)
    dist.barrier()
    return Checkpoint(temporary.parent / f"step_{step}")


def _digests(world: World, folder: Path) -> Digests:
    """Size and checksum of every file, worked out by all ranks together."""
    names = world.broadcast_from_rank0(
        sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
        if world.is_rank0
        else None
    )
    mine = {
        name: checkpoint_files.digest(folder / name) for name in names[world.rank :: world.size]
    }
    everywhere: list[Digests | None] = [None] * world.size
    dist.all_gather_object(everywhere, mine)
    return {name: value for rank in everywhere for name, value in rank.items()}


def _verify(checkpoint: Checkpoint, world: World) -> None:
    """Compares all files with the manifest, each rank some of them. Raises CheckpointError."""
    names: list[str] = []
    with contextlib.suppress(CheckpointError):  # it is among the faults
        names = sorted(checkpoint.files())[world.rank :: world.size]
    everywhere: list[list[str] | None] = [None] * world.size
    dist.all_gather_object(everywhere, checkpoint.faults(names))
    faults = list(dict.fromkeys(itertools.chain(*everywhere)))
    if faults:
        raise checkpoint_files.refusal(checkpoint, faults)
    with (checkpoint.path / ".metadata").open("rb") as file:
        _TensorIndex(file).load()


class _TensorIndex(pickle.Unpickler):
    """Reads torch's index of a checkpoint's tensors, a pickle, if nothing else is in it.

    torch itself reads it with pickle.load, which would run whatever a stranger put there.
    """

    def find_class(self, module: str, name: str) -> object:
        if name not in _INDEX_TYPES.get(module, ()):
            raise CheckpointError(
                f"a checkpoint's .metadata holds {module}.{name}, which no checkpoint of ours does: "
                "it was tampered with, do not use it"
            )
        return super().find_class(module, name)


def _read_state(checkpoint: Checkpoint) -> dict:
    file = checkpoint.path / STATE
    if not file.exists():
        raise CheckpointError(
            f"{checkpoint.path} holds parameters only, no optimizer: it cannot be resumed. Make a "
            "Hugging Face folder of it (fp16rl convert to-hf) and name that as model.path"
        )
    return read_json(file)


def _check_model(checkpoint: Checkpoint, learner: Learner, state: dict) -> None:
    """Raises CheckpointError if the checkpoint is of another model or adapters than the recipe's."""
    lora = learner.settings.lora and learner.settings.lora.model_dump()
    if state.get("lora") != lora:
        raise CheckpointError(
            f"{checkpoint.path} was made with learner.lora={state.get('lora')}, the recipe has {lora}: "
            "resume with the same, or begin a new run from the old one's export/ (model.path)"
        )
    saved = read_json(checkpoint.path / DESCRIPTION / "config.json")
    wanted = read_json(learner.hf_dir / "config.json")
    ignored = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"}
    differing = [
        f"{key}: {saved.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted({*saved, *wanted} - ignored)
        if saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path} is of another model than the recipe's ({'; '.join(differing[:3])})"
        )


def _layout(learner: Learner) -> dict[str, object]:
    return learner.settings.model_dump(include=set(Layout.model_fields))


def _same_everywhere(value: object, world: World) -> object:
    """`value`, having made sure that all ranks have the same."""
    everywhere: list[object] = [None] * world.size
    dist.all_gather_object(everywhere, value)
    if any(other != everywhere[0] for other in everywhere):
        raise CheckpointError(f"the loss scalers of the ranks differ: {everywhere}")
    return value


# Random numbers


def _save_rng(folder: Path, rank: int) -> None:
    folder.mkdir(exist_ok=True)
    tracker = get_cuda_rng_tracker().get_states()
    tensors = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        **{f"megatron {name}": state for name, state in tracker.items()},
    }
    kind, keys, *rest = numpy.random.get_state()
    texts = {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, keys.tolist(), *rest]),
    }
    file = _rng_file(folder, rank)
    save_file({n: t.cpu().clone() for n, t in tensors.items()}, file, metadata=texts)


def _load_rng(folder: Path, rank: int) -> None:
    with safe_open(_rng_file(folder, rank), "pt") as file:
        states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = file.metadata()
    torch.cuda.set_rng_state(states.pop("device"))
    torch.set_rng_state(states.pop("torch"))
    get_cuda_rng_tracker().set_states(
        {name.removeprefix("megatron "): state for name, state in states.items()}
    )
    version, keys, gauss = json.loads(texts["python"])
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(json.loads(texts["numpy"])))


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"
