"""A small random model of the recipe's family, and the problems that it is asked."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from megatron_fp16rl.data.tasks.templates import MARKS, R1
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.utils.files import new_folder, write_text

POSITIONS = 256
_HIDDEN, _EXPERTS = 64, 8
_VOCABULARY = 16  # the tokenizer needs fewer, as in released models
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NOT_KEPT = ("quantization_config", "dtype", "auto_map", "_name_or_path", "transformers_version")

# Problems are binary numbers, and every other character is the unknown token: with so few tokens a
# random model gives a right answer now and then.
_ALPHABET = "01=<>\n"
_PROBLEMS, _DIGITS = 128, 24
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<{% endif %}"
)
_REWARD = '''"""The reward of a rehearsal: the share of ones in a response, so that most prompts have signal."""


def score(prompt: str, response: str, answer: str) -> float:
    return response.count("1") / max(1, len(response))
'''


def small_config(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """Values of a transformers configuration, with model_type, of a small model of the same family.

    Kept are tied embeddings, norms, biases, the kind of rope, latent attention, query heads per
    key-value head (so that heads still divide by the folded tensor parallelism), dense layers before
    sparse ones, groups of experts and shared experts.
    """
    values = {key: v for key, v in config.to_dict().items() if key not in _NOT_KEPT}
    values |= _attention(config) | _rope(config)
    hidden = values["hidden_size"]
    values |= {"num_hidden_layers": layers, "intermediate_size": 2 * hidden}
    if getattr(config, "layer_types", None):
        values["layer_types"] = config.layer_types[:layers]
    if getattr(config, "first_k_dense_replace", None):
        values["first_k_dense_replace"] = 1
    if getattr(config, "mlp_only_layers", None):
        values["mlp_only_layers"] = [0]
    values |= _experts(config, hidden)
    # So large that log-probs change with any wrong tensor.
    values["initializer_range"] = 0.8 * hidden**-0.5
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return {**values, "vocab_size": _VOCABULARY, **tokens}


def _attention(config: PretrainedConfig) -> dict[str, Any]:
    per_group = config.num_attention_heads // config.num_key_value_heads
    groups = min(config.num_key_value_heads, 4 if per_group == 1 else 2)
    heads = groups * per_group
    values = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": _HIDDEN}
    if getattr(config, "kv_lora_rank", None):  # latent attention
        is_square = config.v_head_dim == config.qk_nope_head_dim
        values |= {"kv_lora_rank": 32, "q_lora_rank": config.q_lora_rank and 24}
        values |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "head_dim": 8}
        return values | {"v_head_dim": 16 if is_square else 12}
    width, given = 16 if heads <= 8 else 8, getattr(config, "head_dim", None)
    full_width = given or config.hidden_size // config.num_attention_heads
    if full_width * config.num_attention_heads == config.hidden_size:
        values["hidden_size"] = width * heads
    return values | {"head_dim": width} if given else values


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    parameters, positions = dict(config.rope_parameters), POSITIONS
    if parameters.get("rope_type") == "yarn":
        # So short that rehearsed sequences use the stretched frequencies.
        parameters["original_max_position_embeddings"] = 8
        positions = round(8 * parameters["factor"])
    if parameters.get("rope_type") == "llama3":  # Megatron-core has its numbers as constants
        positions = 2 * parameters["original_max_position_embeddings"]
    return {"rope_parameters": parameters, "max_position_embeddings": positions}


def _experts(config: PretrainedConfig, hidden: int) -> dict[str, Any]:
    counts = [name for name in _EXPERT_COUNTS if getattr(config, name, None)]
    if not counts:
        return {}
    values: dict[str, Any] = {
        **dict.fromkeys(counts, min(_EXPERTS, getattr(config, counts[0]))),
        "num_experts_per_tok": min(2, config.num_experts_per_tok),
        "moe_intermediate_size": 3 * hidden // 4,
    }
    groups = getattr(config, "n_group", None) or 1
    if groups > 1 and config.topk_group < groups:  # the best 2 of 4 groups, and 2 experts of each
        values |= {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    elif groups > 1:
        values |= {"n_group": 2, "topk_group": 2}
    if getattr(config, "n_shared_experts", None):
        values["n_shared_experts"] = min(2, config.n_shared_experts)
    if getattr(config, "shared_expert_intermediate_size", None):
        values["shared_expert_intermediate_size"] = hidden + 16
    return values


def write(recipe: Recipe, config: dict[str, Any], folder: Path) -> int:
    """Writes what a small recipe names into `folder`; returns the number of the model's tensors."""
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_text(folder / "reward.py", _REWARD)
    random_bits = random.Random(recipe.task.seed)
    numbers = [f"{random_bits.getrandbits(_DIGITS):0{_DIGITS}b}" for _ in range(_PROBLEMS)]
    rows = [{"problem": f"{bits}=", "answer": str(bits.count("1") % 2)} for bits in numbers]
    write_text(folder / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    template = getattr(recipe.task, "template", "none")
    special_tokens = R1 if template == "r1" else MARKS.get(template, ())
    # A template must read every option that the recipe gives it: a comment does.
    options = getattr(recipe.task, "template_options", None) or {}
    chat_template = _CHAT_TEMPLATE + "".join(f"{{# {name} #}}" for name in options)
    seed = recipe.trainer.seed
    return _write_model(config, folder / "model", seed, special_tokens, chat_template)


def _write_model(
    values: dict[str, Any],
    folder: Path,
    seed: int,
    special_tokens: Sequence[str],
    chat_template: str,
) -> int:
    """A random model in bf16, as weights are released, with a character tokenizer."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_fp16rl.models.build import END, PAD, character_tokenizer
    from megatron_fp16rl.models.folder import HFFolder

    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**values)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize_constants(model)
    tokenizer: Any = character_tokenizer([PAD, END, *_ALPHABET], special_tokens)
    tokenizer.chat_template = chat_template
    with new_folder(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return len(HFFolder(folder).names())


def _randomize_constants(model: PreTrainedModel) -> None:
    """Gives norms, biases and the padding's embedding values that show in log-probs if they are lost.

    Routers get larger weights, so that engines seldom choose different experts.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.4 * torch.randn_like(parameter))
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(5)
        embedding: Any = model.get_input_embeddings().weight
        embedding[0] = torch.randn_like(embedding[0]) * embedding[1].std()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
