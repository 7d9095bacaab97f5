"""A study from start to end: settings, prompts, samples, scores, and the metrics over them."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch, Prompt, Sample, ScoredBatch
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.metrics import mismatch
from megatron_fp16rl.metrics.top_mismatched import Row
from megatron_fp16rl.models.check import check_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import TORCH_DTYPES, Dtype, Layout, RecipeError
from megatron_fp16rl.tools.settings_file import check_settings, digest, weights_digest
from megatron_fp16rl.utils.files import read_json, read_json_lines, write_json
from megatron_fp16rl.utils.terminal import Console, progress_bars

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

_LARGEST_GROWTH = 3  # layers that `grows_most` names
_RATIOS = ("logprob_abs_mean", "kl_k3", "kl_seq", "seq_log_ratio_std", "slope_per_1k_tokens")


@dataclass(frozen=True)
class Study:
    """What to measure.

    model      a Hugging Face folder
    prompts    a JSONL of {"problem": ...}
    samples    sequences of each dtype; the problems are repeated as often as that takes
    template   "chat": the tokenizer's; "none": the text of the problem alone
    compared   how many of the sequences are compared layer by layer
    deterministic   every sequence has its own seed, the same in every dtype; on a GPU, SGLang then
               uses other kernels
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


def run(study: Study, folder: Path, console: Console) -> dict[str, Any]:
    """Does what of the study is not done yet; returns what it writes as result.json.

    In this process, on one rank, with one server at a time. Raises RecipeError, ServerDied,
    ServerError, and what `scoring.score` raises.
    """
    from megatron_fp16rl.tools.study import sampling, scoring

    check_folder(study.model)
    tokenizer = load_tokenizer(study.model)
    spec = describe(load_config(study.model), Layout())
    prompts = make_prompts(study, tokenizer, spec.max_positions)
    settings = _settings(study, prompts)
    check_settings(folder / "study.json", settings, "a study", "--name")
    with progress_bars(console) as progress:
        for dtype in study.dtypes:
            layers = spec.transformer["num_layers"]
            sampling.sample(study, prompts, layers, dtype, folder, progress)
        unscored = [d for d in study.dtypes if not (folder / d / "scored.jsonl").exists()]
        if unscored:
            scoring.score(study, unscored, folder, tokenizer, progress)
    about = {name: settings[name] for name in ("model", "versions", "platform")}
    result = {**about, **_measure(study, folder)}
    write_json(folder / "result.json", result)
    return result


def parse_dtypes(text: str) -> tuple[Dtype, ...]:
    """ "fp16,bf16" -> ("fp16", "bf16"), each once. Raises RecipeError."""
    dtypes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for dtype in dtypes:
        if dtype not in TORCH_DTYPES:
            raise RecipeError(
                f"--dtypes {text}: there is no {dtype!r}; give some of {','.join(TORCH_DTYPES)}"
            )
    return dtypes


def make_prompts(
    study: Study, tokenizer: "PreTrainedTokenizerBase", positions: int
) -> list[Prompt]:
    """One prompt per sequence to sample. positions: of the model. Raises RecipeError."""
    texts = _problems(study.prompts)
    if study.template == "chat":
        if not tokenizer.chat_template:
            raise RecipeError(f"{study.model} has no chat template; say --template none")
        texts = [templates.chat(text, tokenizer, {}) for text in texts]
    prompts = [Prompt(t, templates.encode(study.template, t, tokenizer), "") for t in texts]
    left = positions - max(len(prompt.ids) for prompt in prompts)
    if study.max_tokens > left:
        raise RecipeError(
            f"--max-tokens {study.max_tokens}: the longest prompt of {study.prompts} leaves {left} of "
            f"the {positions} positions of {study.model}"
        )
    return [prompts[i % len(prompts)] for i in range(study.samples)]


def _problems(path: Path) -> list[str]:
    if not path.exists():
        raise RecipeError(f'--prompts: there is no file {path}; give a JSONL of {{"problem": ...}}')
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            problems.append(str(json.loads(line)["problem"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecipeError(
                f'{path}:{number}: want {{"problem": ...}}, one a line; {error!r}'
            ) from None
    if not problems:
        raise RecipeError(f"--prompts: {path} holds no problems")
    return problems


def _settings(study: Study, prompts: list[Prompt]) -> dict[str, Any]:
    """What a study's folder belongs to; other dtypes may be added to it."""
    return {
        **{key: value for key, value in asdict(study).items() if key not in ("dtypes", "prompts")},
        "model": str(study.model),
        "weights": weights_digest(study.model),
        "prompts": digest([prompt.ids for prompt in prompts]),
        "versions": {name: version(name) for name in ("sglang", "megatron-core", "torch")},
        "platform": platform.current().NAME,
    }


def read_scored(folder: Path, dtype: Dtype) -> list[Row]:
    """Both engines' log-probs of each sequence of a dtype; see top_mismatched.sequence_rows."""
    return read_json_lines(folder / dtype / "scored.jsonl")


def _measure(study: Study, folder: Path) -> dict[str, Any]:
    """The metrics of each dtype, named as by `mismatch.measure`, and its layers, largest first."""
    rows, layers = [], {}
    for dtype in study.dtypes:
        batch = _as_batch(read_scored(folder, dtype))
        metrics = mismatch.measure(batch)
        counts = {"dtype": dtype, "sequences": len(batch), "tokens": int(batch.mask.sum())}
        rows.append(counts | {key.removeprefix("mismatch/"): v for key, v in metrics.items()})
        if study.compared:
            compared = read_json(folder / dtype / "layers.json")
            by_growth = sorted(compared["points"], key=lambda row: -row["added"])
            compared["grows_most"] = [row["point"] for row in by_growth[:_LARGEST_GROWTH]]
            compared["points"].sort(key=lambda row: -row["difference"])
            layers[dtype] = compared
    return {"rows": rows, "bf16_over_fp16": _ratios(rows), "layers": layers}


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """How many times larger the mismatch is in bf16; None without both dtypes."""
    by_dtype = {row["dtype"]: row for row in rows}
    if not {"bf16", "fp16"} <= set(by_dtype):
        return None
    bf16, fp16 = by_dtype["bf16"], by_dtype["fp16"]
    return {key: bf16[key] / fp16[key] for key in _RATIOS if fp16[key]}


def _as_batch(rows: list[Row]) -> ScoredBatch:
    """Scored sequences as a batch again."""
    samples = [
        Sample(
            prompt=Prompt("", row["prompt_ids"], ""),
            group=i,
            ids=row["response_ids"],
            logprobs=row["mu_logprobs"],
            text="",
            truncated=False,
            version=0,
            reward=0.0,
        )
        for i, row in enumerate(rows)
    ]
    batch = Batch.from_samples(samples)
    pi = torch.zeros_like(batch.mu_logprobs)
    pi[batch.mask] = torch.tensor([lp for row in rows for lp in row["pi_logprobs"]])
    return batch.scored(pi)
