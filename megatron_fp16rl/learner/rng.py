"""Random number generators of one rank, saved and restored: Python, numpy, torch, Megatron's tracker."""

import json
import random
from pathlib import Path

import numpy
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save_file


def save(folder: Path, rank: int) -> None:
    """Writes the states of this rank's generators into `folder`."""
    folder.mkdir(exist_ok=True)
    tracker = get_cuda_rng_tracker().get_states()
    tensors = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        **{f"megatron {name}": state for name, state in tracker.items()},
    }
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    texts = {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, numpy.asarray(keys).tolist(), *rest]),
    }
    file = _file(folder, rank)
    save_file({n: t.cpu().clone() for n, t in tensors.items()}, file, metadata=texts)


def load(folder: Path, rank: int) -> None:
    with safe_open(_file(folder, rank), "pt") as file:
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


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"
