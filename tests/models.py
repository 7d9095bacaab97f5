"""Tiny recipes and tiny Hugging Face models of every family."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.selftest import models as tiny

# Dense ones, and mixtures of experts.
_IS_MOE = {"num_experts", "n_routed_experts", "num_local_experts"}
FAMILIES = {name: config for name, config in tiny.EVERY.items() if not _IS_MOE & config.keys()}
MOE_FAMILIES = {name: config for name, config in tiny.EVERY.items() if _IS_MOE & config.keys()}
QWEN3, QWEN3_MOE = FAMILIES["qwen3-tied"], MOE_FAMILIES["qwen3-moe"]
DEEPSEEK_V3, GLM4_MOE = MOE_FAMILIES["deepseek-v3"], MOE_FAMILIES["glm4-moe"]
GLM4_MOE_LITE, GPT_OSS = MOE_FAMILIES["glm4-moe-lite"], MOE_FAMILIES["gpt-oss"]
QWEN3_NEXT = MOE_FAMILIES["qwen3-next"]
YARN, LLAMA3_ROPE = (m["rope_parameters"] for m in (DEEPSEEK_V3, FAMILIES["llama-3.1"]))
KIMI_K2 = {  # where it differs from DeepSeek-V3: no groups of experts, one frequency where yarn changes
    **DEEPSEEK_V3,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {**YARN, "factor": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0},
}
# Served by tests/e2e/test_server.py: a configuration, and the ranks of its server.
SERVED = {
    "Kimi-K2": ({**DEEPSEEK_V3, "first_k_dense_replace": 0}, 1),
    # So large an eps shows which norms have it.
    "GLM-4.7-Flash": ({**GLM4_MOE_LITE, "rms_norm_eps": 1e-2}, 1),
    "gpt-oss": ({**GPT_OSS, "sliding_window": 3}, 1),  # shorter than the test's sequences
    # With less, norms make much of the rounding of small outputs of random delta nets.
    "Qwen3-Next": ({**QWEN3_NEXT, "rms_norm_eps": 1e-1}, 1),
    # SGLang pads each rank's 48 rows of an expert to 64 on a CPU.
    "experts on two ranks": ({**QWEN3_MOE, "tie_word_embeddings": False}, 2),
}
DEEP = {"qwen3-deep": {**QWEN3, "num_hidden_layers": 4}}
# Of a layer only the input is kept: `learner.megatron`.
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
ALPHABET = "0123456789+="
hf_model, random_tokens = tiny.hf_model, tiny.random_tokens


def recipe(**changes) -> Recipe:
    """A recipe for a tiny random Qwen3 on the addition task; `learner`, ... replace sections."""
    values = {
        "name": "tiny",
        "model": {"build": {"config": QWEN3, "alphabet": ALPHABET}},
        "task": {"kind": "addition"},
        "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 5},
        "learner": {"global_batch_size": 8},
        "trainer": {"steps": 3},
    }
    return Recipe.model_validate({**values, **changes})


def whole_folder(folder: Path, **config) -> Path:
    """A Hugging Face folder as people have it: weights, configuration, tokenizer with a chat template."""
    from megatron_fp16rl.models.build import build
    from megatron_fp16rl.recipe import BuildModel

    build(BuildModel(config={**QWEN3, **config}, alphabet=ALPHABET), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    )
    return folder


def edit_json(file: Path, **changes) -> None:
    """Sets keys of a JSON file, which is made if there is none; `...` removes one."""
    values = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Writes model.safetensors again after `change` had its tensors by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_mxfp4(folder: Path, exponents: tuple[int, int]) -> None:
    """Gives a gpt-oss folder random experts in MXFP4, the rest in bf16. exponents: of blocks, 127 for 1."""
    generator = torch.Generator().manual_seed(0)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            sizes = (experts, rows, columns // 32, 16)
            blocks = torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8)
            scales = torch.randint(*exponents, sizes[:-1], generator=generator, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor

    edit_tensors(folder, pack)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})


def lively_adapter(name: str, shape: torch.Size) -> torch.Tensor:
    """A LoRA matrix as if trained for long, by its Hugging Face name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.2 * torch.randn(shape, generator=generator)
