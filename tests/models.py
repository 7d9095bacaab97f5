"""Tiny recipes and tiny Hugging Face models of every family."""

import gc
import json
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fp16rl.recipe import Recipe

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {
    "llama": {**QWEN3, "model_type": "llama", "tie_word_embeddings": False},
    "llama-3.1": {**QWEN3, "model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "qwen2": {**QWEN3, "model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {**QWEN3, "tie_word_embeddings": False},
    "qwen3-tied": QWEN3,
}
DEEP = {"qwen3-deep": {**QWEN3, "num_hidden_layers": 4}}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8,  # short, so that every frequency is treated differently
    "beta_fast": 1.0,
    "beta_slow": 0.25,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 128,
    "rope_parameters": YARN,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    # The original configuration's keys, which SGLang reads.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}
GLM4_MOE = {
    **QWEN3,
    "model_type": "glm4_moe",
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
}
MOE_FAMILIES = {
    "qwen3-moe": QWEN3_MOE,
    "qwen3-moe-mixed": {
        **QWEN3_MOE,
        "mlp_only_layers": [0],
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
    "qwen2-moe": {
        **QWEN3_MOE,
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 80,
        "norm_topk_prob": False,
    },
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-plain": {  # no rank of its own for queries, plain rope, no groups
        **DEEPSEEK_V3,
        "q_lora_rank": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "n_group": 1,
        "topk_group": 1,
    },
    "glm4-moe": GLM4_MOE,
    "glm4-moe-plain": {**GLM4_MOE, "attention_bias": False, "use_qk_norm": False},
}
ALPHABET = "0123456789+="


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside a `with` block that are alive: now, and at most."""

    def __enter__(self):
        self.now = self.peak = 0
        self._users: dict[int, int] = {}
        self._old: set[int] = set()
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self._old.add(thing.untyped_storage().data_ptr())
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._old or not size:
            return
        if not self._users.get(key):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._leave, key, size)

    def _leave(self, key, size):
        self._users[key] -= 1
        if not self._users[key]:
            self.now -= size


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


def hf_model(config: dict, folder: Path, vocabulary: int = 99):
    """Writes a random fp32 model with lively norms and biases; returns it, in evaluation mode.

    99 tokens: odd on purpose, so that tensor parallelism has to pad the vocabulary.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    made = AutoConfig.for_model(options.pop("model_type"), vocab_size=vocabulary, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(20)  # a router whose choices are no toss-up
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return model


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


def lively_adapter(name: str, shape: torch.Size) -> torch.Tensor:
    """A LoRA matrix as if trained for long, by its Hugging Face name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.2 * torch.randn(shape, generator=generator)


def random_tokens(vocabulary: int = 99, lengths: tuple[int, ...] = (9, 24, 17, 24)):
    """Sequences of unequal length, without token 0.

    Token 0 pads: transformers makes its embedding zero, and the norm of a zero vector has a
    gradient 1,000 times larger than any other.
    """
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
