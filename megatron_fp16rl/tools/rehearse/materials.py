"""What a rehearsal needs on disk: a random model as if it were released, and made-up problems."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from megatron_fp16rl.data.tasks.templates import MARKS, R1
from megatron_fp16rl.tools.rehearse.shrink import Small
from megatron_fp16rl.utils.files import new_folder, write_text

# Problems are in binary. Other letters are the tokenizer's unknown token: with few tokens, a random
# model is right now and then.
_ALPHABET = "01=<>\n"
_CHAT = (
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<{% endif %}"
)
_PROBLEMS, _DIGITS = 128, 24
_REWARD = '''"""The reward of a rehearsal: the share of ones in a response, so that most prompts have signal."""


def score(prompt: str, response: str, answer: str) -> float:
    return response.count("1") / max(1, len(response))
'''


def write(small: Small, folder: Path) -> int:
    """Writes model/, problems.jsonl and reward.py into `folder`; returns the number of tensors."""
    write_text(folder / "recipe.yaml", small.recipe.to_yaml())
    write_text(folder / "reward.py", _REWARD)
    draw = random.Random(small.recipe.task.seed)
    problems = [f"{draw.getrandbits(_DIGITS):0{_DIGITS}b}=" for _ in range(_PROBLEMS)]
    rows = [{"problem": text, "answer": str(text.count("1") % 2)} for text in problems]
    write_text(folder / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = small.recipe.task
    marks = R1 if task.template == "r1" else MARKS.get(task.template, ())
    reads = "".join(f"{{# {name} #}}" for name in task.template_options or {})
    return _write_model(
        small.config, folder / "model", small.recipe.trainer.seed, marks, _CHAT + reads
    )


def _write_model(
    values: dict[str, object], folder: Path, seed: int, marks: Sequence[str], chat: str
) -> int:
    """A random model with a character tokenizer, in bf16, as weights are released.

    marks: texts that are one token. chat: the tokenizer's chat template.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_fp16rl.models.build import END, PAD, character_tokenizer
    from megatron_fp16rl.models.folder import HFFolder

    transformers.utils.logging.disable_progress_bar()
    config = AutoConfig.for_model(**values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _enliven(model)
    tokenizer = character_tokenizer([PAD, END, *_ALPHABET], marks)
    tokenizer.chat_template = chat
    with new_folder(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return len(HFFolder(folder).names())


def _enliven(model: object) -> None:
    """Norms, biases and the padding's embedding get values that matter; a router's choices are clear."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.4 * torch.randn_like(parameter))
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(5)
        embedding = model.get_input_embeddings().weight
        embedding[0] = torch.randn_like(embedding[0]) * embedding[1].std()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
