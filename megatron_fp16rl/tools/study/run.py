"""The study from start to end: sample, score, measure."""

from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, ScoredBatch
from megatron_fp16rl.metrics import mismatch
from megatron_fp16rl.metrics.top_mismatched import Row
from megatron_fp16rl.models.check import check_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import Dtype, Layout
from megatron_fp16rl.tools.study.sampling import sample
from megatron_fp16rl.tools.study.scoring import learn
from megatron_fp16rl.tools.study.settings import Study, claim, make_prompts
from megatron_fp16rl.utils.files import read_json, read_json_lines, write_json
from megatron_fp16rl.utils.terminal import Console, progress_bars

_GROWING = 3  # layers named for making the difference larger
_RATIOS = ("logprob_abs_mean", "kl_k3", "kl_seq", "seq_log_ratio_std", "slope_per_1k_tokens")


def run(study: Study, folder: Path, console: Console) -> dict[str, object]:
    """Does what of the study is not done yet; returns what it writes as result.json.

    In this process, on one rank, with one server at a time. Raises RecipeError for what cannot be
    done, ServerDied, ServerError, and what `scoring.learn` raises.
    """
    check_folder(study.model)
    tokenizer = load_tokenizer(study.model)
    spec = describe(load_config(study.model), Layout())
    prompts = make_prompts(study, tokenizer, spec.max_positions)
    claim(folder, study, prompts)
    with progress_bars(console) as progress:
        for dtype in study.dtypes:
            sample(study, prompts, spec.transformer["num_layers"], dtype, folder, progress)
        unscored = [d for d in study.dtypes if not (folder / d / "scored.jsonl").exists()]
        if unscored:
            learn(study, unscored, folder, tokenizer, progress)
    result = _result(study, folder)
    write_json(folder / "result.json", result)
    return result


def read_scored(folder: Path, dtype: Dtype) -> list[Row]:
    """What both engines say of each sequence of a dtype; see top_mismatched.sequence_rows."""
    return read_json_lines(folder / dtype / "scored.jsonl")


def _result(study: Study, folder: Path) -> dict[str, object]:
    """Metrics of each dtype under the names of `mismatch.measure`, and layers in the order of size."""
    rows, layers = [], {}
    for dtype in study.dtypes:
        batch = _batch(read_scored(folder, dtype))
        found = mismatch.measure(batch)
        rows.append(
            {
                "dtype": dtype,
                "sequences": len(batch),
                "tokens": int(batch.mask.sum()),
                **{name.removeprefix("mismatch/"): value for name, value in found.items()},
            }
        )
        if study.compared:
            found = read_json(folder / dtype / "layers.json")
            by_growth = sorted(found["points"], key=lambda row: -row["added"])
            found["grows_most"] = [row["point"] for row in by_growth[:_GROWING]]
            found["points"].sort(key=lambda row: -row["difference"])
            layers[dtype] = found
    asked = read_json(folder / "study.json")
    about = {name: asked[name] for name in ("model", "versions", "platform")}
    return {**about, "rows": rows, "bf16_over_fp16": _ratios(rows), "layers": layers}


def _ratios(rows: list[dict[str, object]]) -> dict[str, float] | None:
    """How many times larger the mismatch is in bf16; None without both dtypes."""
    found = {row["dtype"]: row for row in rows}
    if not {"bf16", "fp16"} <= set(found):
        return None
    return {key: found["bf16"][key] / found["fp16"][key] for key in _RATIOS if found["fp16"][key]}


def _batch(rows: list[Row]) -> ScoredBatch:
    """Scored sequences as a batch again."""
    batch = Batch.from_samples(
        [
            Sample(
                Prompt("", row["prompt_ids"], ""), i, row["response_ids"], row["mu_logprobs"], "", False, 0, 0.0
            )
            for i, row in enumerate(rows)
        ]
    )  # fmt: skip
    pi = torch.zeros_like(batch.mu_logprobs)
    pi[batch.mask] = torch.tensor([lp for row in rows for lp in row["pi_logprobs"]])
    return batch.scored(pi)
