"""What a study measures, and the folder that belongs to it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.recipe import TORCH_DTYPES, Dtype, RecipeError
from megatron_fp16rl.utils.files import read_json, write_json


@dataclass(frozen=True)
class Study:
    """What to measure.

    model      a Hugging Face folder
    prompts    a JSONL of {"problem": ...}
    samples    sequences of each dtype; the problems are gone through as often as that takes
    template   "chat": the tokenizer's; "none": the text of the problem alone
    compared   how many of the sequences are compared layer by layer
    deterministic   every sequence is drawn with a seed of its own, the same in every dtype. On a
               GPU, SGLang takes other kernels for it than it takes otherwise
    """

    model: Path
    dtypes: tuple[Dtype, ...]
    prompts: Path
    samples: int
    max_tokens: int
    template: Literal["chat", "none"] = "chat"
    compared: int = 4
    seed: int = 0
    deterministic: bool = True


def parse_dtypes(text: str) -> tuple[Dtype, ...]:
    """ "fp16,bf16" -> ("fp16", "bf16"), each once. Raises RecipeError."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for dtype in found:
        if dtype not in TORCH_DTYPES:
            raise RecipeError(
                f"--dtypes {text}: there is no {dtype!r}; give some of {','.join(TORCH_DTYPES)}"
            )
    return found


def make_prompts(study: Study, tokenizer: object, positions: int) -> list[Prompt]:
    """One for each sequence to be sampled. positions: of the model. Raises RecipeError."""
    texts = _problems(study.prompts)
    if study.template == "chat":
        if not tokenizer.chat_template:
            raise RecipeError(f"{study.model} has no chat template; say --template none")
        texts = [templates.chat(text, tokenizer, {}) for text in texts]
    known = [Prompt(t, templates.encode(study.template, t, tokenizer), "") for t in texts]
    left = positions - max(len(prompt.ids) for prompt in known)
    if study.max_tokens > left:
        raise RecipeError(
            f"--max-tokens {study.max_tokens}: the longest prompt of {study.prompts} leaves {left} of "
            f"the {positions} positions of {study.model}"
        )
    return [known[i % len(known)] for i in range(study.samples)]


def _problems(path: Path) -> list[str]:
    if not path.exists():
        raise RecipeError(f'--prompts: there is no file {path}; give a JSONL of {{"problem": ...}}')
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(str(json.loads(line)["problem"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecipeError(
                f'{path}:{number}: want {{"problem": ...}}, one a line; {error!r}'
            ) from None
    if not found:
        raise RecipeError(f"--prompts: {path} holds no problems")
    return found


def claim(folder: Path, study: Study, prompts: list[Prompt]) -> None:
    """Takes the folder for a study, so that only its own samples are ever found there.

    Other dtypes may be added to it. Raises RecipeError if it belongs to another study.
    """
    files = sorted(study.model.glob("*.safetensors"))
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    asked = {
        **{k: v for k, v in asdict(study).items() if k != "dtypes"},
        "model": str(study.model),
        "weights": _digest(weights),
        "prompts": _digest([prompt.ids for prompt in prompts]),
        "versions": {name: version(name) for name in ("sglang", "megatron-core", "torch")},
        "platform": platform.current().NAME,
    }
    file = folder / "study.json"
    if file.exists():
        found = read_json(file)
        for key, value in asked.items():
            if found.get(key) != value:
                raise RecipeError(
                    f"{folder} holds a study with {key} = {found.get(key)}, not {value}; give this "
                    "one another --name, or remove that folder"
                )
    write_json(file, asked)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
