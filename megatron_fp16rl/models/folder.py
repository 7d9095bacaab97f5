"""Reads tensors of a Hugging Face folder, or slices of them, one at a time; writes such folders in shards."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_fp16rl.models import mxfp4
from megatron_fp16rl.models.config import damage
from megatron_fp16rl.models.source import INDEX, SINGLE, WeightsError, weight_files
from megatron_fp16rl.recipe import Lora
from megatron_fp16rl.utils.files import new_folder, write_json

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # compared at once
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


@dataclass(frozen=True)
class Entry:
    """A tensor in a file's header. dtype: as safetensors names it, e.g. BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class HFFolder:
    """All headers are read at once, tensors one at a time.

    entries     of all tensors, by name; a tensor in MXFP4 as what it is read as, bf16
    packed      of those in MXFP4: the entries of blocks and scales
    bytes_read  of tensors and slices so far
    """

    def __init__(self, path: str | Path) -> None:
        """Raises WeightsError, naming the file, for what cannot be read or contradicts itself."""
        self.path = Path(path)
        files, index = weight_files(self.path)
        self.entries: dict[str, Entry] = {}
        for file in files:
            with _open(self.path / file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in self.entries:
                        raise WeightsError(
                            f"{self.path}: {name} is in {self.entries[name].file} and in {file}: remove "
                            "the file that is not meant"
                        )
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    self.entries[name] = Entry(file, str(part.get_dtype()), shape)
        if index is not None:
            self._check_index(index)
        self.packed: dict[str, tuple[Entry, Entry]] = {}
        for name in [
            n.removesuffix(mxfp4.BLOCKS) for n in self.entries if n.endswith(mxfp4.BLOCKS)
        ]:
            if name + mxfp4.SCALES in self.entries:
                self._pack(name)
        self._open: dict[str, safe_open] = {}
        self.bytes_read = 0

    def _pack(self, name: str) -> None:
        blocks, scales = (self.entries.pop(name + end) for end in (mxfp4.BLOCKS, mxfp4.SCALES))
        *stack, rows, count, size = (1, 1, *blocks.shape)[-max(4, len(blocks.shape)) :]
        if (
            {blocks.dtype, scales.dtype} != {"U8"}
            or size != 16
            or scales.shape != blocks.shape[:-1]
        ):
            raise WeightsError(
                f"{self.path / blocks.file}: {name}{mxfp4.BLOCKS} is {blocks.dtype} {list(blocks.shape)}, its "
                f"{mxfp4.SCALES} {scales.dtype} {list(scales.shape)}: that is not MXFP4"
            )
        self.packed[name] = blocks, scales
        self.entries[name] = Entry(blocks.file, "BF16", (*stack, count * size * 2, rows))

    def _check_index(self, index: dict[str, str]) -> None:
        actual = {name: entry.file for name, entry in self.entries.items()}
        for name in sorted({*index, *(name for name in actual if not is_derived(name))}):
            if index.get(name) != actual.get(name):
                raise WeightsError(
                    f"{self.path / INDEX} has {name} in {index.get(name, 'no file')}, but it is in "
                    f"{actual.get(name, 'no file')}: the index is of other files; fetch both again"
                )

    def names(self) -> list[str]:
        return sorted(self.entries)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype it has on disk. Raises WeightsError naming folder or file."""
        if name in self.packed:
            return self.read_box(name, (0,) * len(self.entry(name).shape), self.entry(name).shape)
        return self._counted(self._opened(self.entry(name).file).get_tensor(name))

    def read_box(self, name: str, first: tuple[int, ...], last: tuple[int, ...]) -> torch.Tensor:
        """A tensor's numbers from `first` to before `last` along each dimension; raises as `read` does."""
        box = tuple(map(slice, first, last))
        if name not in self.packed:
            return self._counted(self._opened(self.entry(name).file).get_slice(name)[box])
        # On disk an expert's rows are the tensor's columns; blocks of whole rows are read.
        rows = (*box[:-2], box[-1])
        blocks, scales = (
            self._counted(self._opened(entry.file).get_slice(name + end)[rows])
            for entry, end in zip(self.packed[name], (mxfp4.BLOCKS, mxfp4.SCALES), strict=True)
        )
        return mxfp4.dequantised(blocks, scales)[..., box[-2], :]

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes_read += tensor.nbytes
        return tensor

    def entry(self, name: str) -> Entry:
        """What the header says of a tensor. Raises WeightsError if there is none."""
        if name not in self.entries:
            raise WeightsError(f"{self.path} has no tensor {name}")
        return self.entries[name]

    def check_tied(self, rank: int = 0, ranks: int = 1) -> None:
        """Raises WeightsError if a tied model's folder has another output layer than its embedding.

        Of `ranks`, each compares a share of the rows.
        """
        if OUTPUT not in self.entries:
            return
        embedding, output = (
            self._opened(self.entries[n].file).get_slice(n) for n in (EMBEDDING, OUTPUT)
        )
        rows = embedding.get_shape()[0]
        if embedding.get_shape() != output.get_shape() or not all(
            torch.equal(embedding[i : i + _ROWS], output[i : i + _ROWS].to(embedding[:0].dtype))
            for i in range(rank * _ROWS, rows, ranks * _ROWS)
        ):
            raise WeightsError(
                f"{self.where(OUTPUT)} is not the embedding, but config.json ties the two: set "
                f"tie_word_embeddings to false there, or remove {OUTPUT} if it is a leftover"
            )

    def where(self, name: str) -> str:
        """File and name of a tensor, for messages."""
        return f"{self.path / self.entries[name].file}: {name}"

    def _opened(self, file: str) -> safe_open:
        if file not in self._open:
            self._open[file] = _open(self.path / file)
        return self._open[file]


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the configuration; old folders have such tensors."""
    return name.endswith("rotary_emb.inv_freq")


def is_spare(name: str, layers: int, mtp_layers: int, tied: bool) -> bool:
    """Whether the learner's model ignores a tensor of a folder.

    Derived tensors, a tied model's output layer, and what is for multi-token prediction, which is not trained:
    the last `mtp_layers` layers, or Qwen's `mtp`.
    """
    if is_derived(name) or (tied and name == OUTPUT) or name.startswith("mtp."):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and 0 <= int(layer[1]) - layers < mtp_layers


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        fault = damage(file) or f"is cut short or no safetensors file ({error}): fetch it again"
        raise WeightsError(f"{file} {fault}") from error


def copy_description(hf_dir: Path, folder: Path, dtype: str) -> None:
    """Copies configuration and tokenizer of a Hugging Face folder, everything but the weights.

    dtype: transformers' name of the new weights' dtype, e.g. "float16".
    """
    folder.mkdir(exist_ok=True)
    for name in _DESCRIPTION_FILES:
        if (hf_dir / name).exists():
            (folder / name).write_bytes((hf_dir / name).read_bytes())
    config = json.loads((hf_dir / "config.json").read_text())
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)  # what was read in MXFP4 is written in a dtype
    write_json(folder / "config.json", {**config, "dtype": dtype})


def write_folder(
    path: Path, hf_dir: Path, dtype: str, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Writes a Hugging Face folder with the configuration and tokenizer of `hf_dir` and new weights.

    dtype: as in `copy_description`. Atomic: the folder appears whole or not at all. Holds one shard of at
    most 4 GiB in memory.
    """
    with new_folder(path) as folder:
        copy_description(hf_dir, folder, dtype)
        _write_shards(folder, tensors)


def write_adapter(
    path: Path, base: str, lora: Lora, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Writes LoRA adapters as PEFT does, atomically.

    base: path or name of their model. tensors: by Hugging Face names.
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
