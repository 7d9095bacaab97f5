"""Hugging Face folders: reading tensors one at a time, writing them in shards."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_fp16rl.files import new_folder, write_json
from megatron_fp16rl.recipe import Lora
from megatron_fp16rl.weights.source import INDEX, SINGLE

_SHARD_BYTES = 4 << 30
_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class HFFolder:
    """The safetensors of a Hugging Face folder, read lazily."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / INDEX
        if index.exists():
            self._files = json.loads(index.read_text())["weight_map"]
        elif (self.path / SINGLE).exists():
            with safe_open(self.path / SINGLE, "pt") as file:
                self._files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(
                f"{self.path} holds neither {SINGLE} nor {INDEX}: it is not a Hugging Face folder "
                "with safetensors"
            )
        self._open: dict[str, safe_open] = {}

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype it has on disk. Raises KeyError naming the folder."""
        if name not in self._files:
            raise KeyError(f"{self.path} has no tensor {name}")
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, "pt")
        return self._open[file].get_tensor(name)


def copy_description(like: Path, folder: Path, dtype: str) -> None:
    """Copies configuration and tokenizer of a Hugging Face folder, everything but the weights.

    dtype: transformers' name of the weights' dtype, e.g. "float16".
    """
    folder.mkdir(exist_ok=True)
    for name in _DESCRIPTION_FILES:
        if (like / name).exists():
            (folder / name).write_bytes((like / name).read_bytes())
    config = json.loads((like / "config.json").read_text())
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", {**config, "dtype": dtype})


def write_folder(
    path: Path, like: Path, dtype: str, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Writes a Hugging Face folder with configuration and tokenizer of `like` and new weights.

    dtype: as in `copy_description`. The folder appears whole or not at all. One shard of at most 4 GiB is held in memory.
    """
    with new_folder(path) as folder:
        copy_description(like, folder, dtype)
        _write_shards(folder, tensors)


def write_adapter(
    path: Path, base: str, lora: Lora, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Writes LoRA adapters as PEFT does. The folder appears whole or not at all.

    base: path or name of the model that they are for; tensors: by Hugging Face's names.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": lora.targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    named = {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in tensors}
    with new_folder(path) as folder:
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > _SHARD_BYTES:
            flush()
        pending[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
