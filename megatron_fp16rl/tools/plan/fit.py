"""Fits the time model's efficiencies on public measurements, and shows how far off it is.

    python -m megatron_fp16rl.tools.plan.fit              print the fit and its tables
    python -m megatron_fp16rl.tools.plan.fit --write      put both into rates.py and docs/planner.md

Three rows are fitted; each is also predicted from a fit on the other two. Nobody published what the
parts of these steps took, so four numbers are drawn from three totals: a prior (rates.py) holds them in
place, and what the rows do not tell stays as it was believed.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from megatron_fp16rl.tools.plan.arithmetic import Costs, costs
from megatron_fp16rl.tools.plan.decoding import Lengths, Servers, rollout
from megatron_fp16rl.tools.plan.gpus import GPUS
from megatron_fp16rl.tools.plan.rates import PRIOR, PRIOR_FACTORS, SHIPPED, Efficiencies
from megatron_fp16rl.tools.plan.servers import token_bytes, weight_bytes
from megatron_fp16rl.tools.plan.times import Step, Team, learner, publish

_GPU = GPUS["h100-80gb"]
_PROMPT = 128  # assumed: tokens of a problem of OpenMathInstruct-2 with its instruction
# Assumed: where generation and training share GPUs, the learner's state goes to the host and back: gradient,
# main weight and moments, so many bytes a parameter; each GPU moves so much while eight do (pageable).
_SWAPPED, _HOST_GBPS = 16, 10
_ROW_FACTOR = 1.15  # a row that is off by so much is one standard deviation
_NEMO = "https://docs.nvidia.com/nemo/rl/0.6.0/about/performance-summary.html"

_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}
_MODELS: dict[str, dict[str, object]] = {
    "Qwen3-30B-A3B": {
        **_QWEN3_MOE,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": {
        **_QWEN3_MOE,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
    },
    "DeepSeek-V3": {"model_type": "deepseek_v3"},  # transformers' defaults are its numbers
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "Qwen3-32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}


@dataclass(frozen=True)
class Row:
    """A published step time of NeMo-RL on H100, BF16, GRPO, and how it was made.

    longest, average   tokens of a sequence with its prompt
    off                one step off policy: GPUs are split in two halves, which work at once; else
                       all of them generate and train in turn
    """

    name: str
    model: str
    step_s: float
    gpus: int
    longest: int
    average: int
    prompts: int
    sequences: int
    batch: int
    generation: int
    team: Team
    off: bool = False
    version: str = "0.6"


def _team(tensor: int, context: int, expert: int, pipeline: int, **more: object) -> Team:
    """In the order of the published table. Micro-batches of one longest sequence, packed."""
    return Team(
        ranks=0,
        tensor_parallel=tensor,
        context_parallel=context,
        expert_parallel=expert,
        pipeline_parallel=pipeline,
        distributed_optimizer=True,
        **more,
    )


# Stages of both large models are uneven, as NeMo-RL's own recipes have them.
_QWEN = {"recompute": True, "first_stage_layers": 11, "last_stage_layers": 11}
_DEEPSEEK = {"recompute": True, "first_stage_layers": 3, "last_stage_layers": 2}
ROWS = (
    Row("Qwen3-30B-A3B, 32 GPUs", "Qwen3-30B-A3B", 192, 32, 4096, 3203, 64, 2048, 512, 2,
        _team(1, 1, 8, 1)),
    Row("Qwen3-235B-A22B, 128 GPUs", "Qwen3-235B-A22B", 395, 128, 8192, 5698, 16, 512, 512, 16,
        _team(2, 2, 16, 8, **_QWEN)),
    Row("DeepSeek-V3, 256 GPUs", "DeepSeek-V3", 134, 256, 1536, 701, 32, 512, 512, 32,
        _team(1, 1, 16, 16, **_DEEPSEEK)),
)  # fmt: skip
# Never fitted. Of the dense models the latest rows are of version 0.5.
OTHERS = (
    Row("Qwen3-235B-A22B, 256 GPUs", "Qwen3-235B-A22B", 312, 256, 8192, 5713, 16, 512, 512, 16,
        _team(2, 2, 16, 8, **_QWEN)),
    Row("DeepSeek-V3, 512 GPUs", "DeepSeek-V3", 111, 512, 1536, 697, 32, 512, 512, 32,
        _team(1, 1, 16, 16, **_DEEPSEEK)),
    Row("Qwen3-30B-A3B, 32 GPUs, 1 step off", "Qwen3-30B-A3B", 152, 32, 4096, 3201, 64, 2048, 512, 2,
        _team(1, 1, 8, 2), off=True),
    Row("Qwen3-235B-A22B, 256 GPUs, 1 step off", "Qwen3-235B-A22B", 231, 256, 8192, 5721, 16, 512,
        512, 8, _team(4, 1, 16, 8, **_QWEN), off=True),
    Row("DeepSeek-V3, 512 GPUs, 1 step off", "DeepSeek-V3", 64.1, 512, 1536, 710, 32, 512, 512, 32,
        _team(1, 1, 16, 16, **_DEEPSEEK), off=True),
    Row("Llama-3.1-8B, 16 GPUs", "Llama-3.1-8B", 92.8, 16, 4096, 1019, 64, 2048, 512, 1,
        _team(1, 1, 1, 2, recompute=True), version="0.5"),
    Row("Qwen3-32B, 32 GPUs", "Qwen3-32B", 376, 32, 4096, 3251, 64, 2048, 512, 4,
        _team(4, 1, 1, 4), version="0.5"),
)  # fmt: skip

# Published times of weight syncs between nodes, NCCL broadcasts of miles, with the learners' layouts:
# https://lmsys.org/blog/2026-04-29-p2p-update. Bytes of bf16 weights.
SYNCS = (
    ("Qwen3-30B-A3B, 2 + 2 nodes", "Qwen3-30B-A3B", 2.67,
     Team(16, tensor_parallel=4, expert_parallel=8)),
    ("Qwen3-235B-A22B, 8 + 8 nodes", "Qwen3-235B-A22B", 10.8,
     Team(64, tensor_parallel=4, pipeline_parallel=4, context_parallel=2, expert_parallel=16)),
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step and of its parts."""

    step_s: float
    rollout_s: float
    score_s: float
    update_s: float
    sync_s: float


def model(name: str) -> Costs:
    """One of the models above, counted."""
    from transformers import AutoConfig

    return costs(AutoConfig.for_model(**_MODELS[name]))


def predict(row: Row, rates: Efficiencies) -> Prediction:
    """What the time model says of a row."""
    counted, gpus = model(row.model), row.gpus // (2 if row.off else 1)
    lengths = Lengths(_PROMPT, row.average - _PROMPT, row.longest - _PROMPT)
    step = Step(
        row.sequences,
        row.prompts,
        lengths,
        updates=row.sequences // row.batch,
        scorings=2,  # before the update, and under the reference policy
    )
    team = replace(row.team, ranks=gpus, micro_batch_tokens=row.longest)
    token = token_bytes(counted, row.generation, 2)
    weights = weight_bytes(counted, row.generation, 2)
    share = 0.8 if row.off else 0.6  # vLLM's gpu_memory_utilization
    cache = _GPU.memory_gib * 2**30 * share - weights
    servers = Servers(gpus // row.generation, row.generation, int(cache / token), 1024, token)
    made = rollout(counted, servers, lengths, row.sequences, row.prompts, 2, _GPU, rates)
    learnt = learner(counted, team, step, _GPU, rates)
    # All weights come to every GPU over its network card, which keeps what is its own.
    sync = counted.parameters * 2 / (_GPU.network_gbps * 1e9 * rates.network)
    if not row.off:
        sync += 2 * counted.parameters / gpus * _SWAPPED / (_HOST_GBPS * 1e9)
    score, update = learnt["score"], learnt["update"]
    work = max(made.seconds, score + update) if row.off else made.seconds + score + update
    return Prediction(work + sync, made.seconds, score, update, sync)


def fit(rows: Sequence[Row]) -> Efficiencies:
    """The likeliest efficiencies under the prior and the rows, all errors being factors."""
    from scipy.optimize import least_squares

    believed = [math.log(value) for value in astuple(PRIOR)]
    firmness = [math.log(factor) for factor in astuple(PRIOR_FACTORS)]

    def errors(logs: Sequence[float]) -> list[float]:
        rates = Efficiencies(*map(math.exp, logs))
        off = [math.log(predict(row, rates).step_s / row.step_s) for row in rows]
        strayed = zip(logs, believed, firmness, strict=True)
        return [error / math.log(_ROW_FACTOR) for error in off] + [
            (log - prior) / width for log, prior, width in strayed
        ]

    found = least_squares(errors, believed, diff_step=1e-3)
    return Efficiencies(*(float(f"{math.exp(log):.3g}") for log in found.x))


def tables(shipped: Efficiencies = SHIPPED) -> str:
    """The tables of docs/planner.md: of `shipped`, and of fits that leave one row out."""
    left_out = [fit([other for other in ROWS if other is not row]) for row in ROWS]
    parts = (
        _efficiencies(shipped, left_out),
        _fitted(shipped, left_out),
        _others(shipped),
        _syncs(shipped),
    )
    return "\n\n".join("\n".join(lines) for lines in parts)


def _efficiencies(shipped: Efficiencies, left_out: list[Efficiencies]) -> list[str]:
    without = " | ".join(f"without {row.model}" for row in ROWS)
    lines = [f"| | prior | fitted on all three | {without} |", "|---|---|---|" + "---|" * len(ROWS)]
    for field in fields(Efficiencies):
        values = [getattr(rates, field.name) for rates in (PRIOR, shipped, *left_out)]
        lines.append(f"| `{field.name}` | " + " | ".join(f"{value:g}" for value in values) + " |")
    return lines


def _fitted(shipped: Efficiencies, left_out: list[Efficiencies]) -> list[str]:
    lines = [
        "| fitted rows (NeMo-RL 0.6) | published, s | predicted from the other two, s | error | "
        "fitted on all three, s | of this rollout, score, update, sync, s |",
        "|---|---|---|---|---|---|",
    ]
    for row, rates in zip(ROWS, left_out, strict=True):
        blind, seen = predict(row, rates), predict(row, shipped)
        lines.append(
            f"| {row.name} | {row.step_s:g} | {blind.step_s:.0f} | {_error(blind.step_s, row.step_s)} "
            f"| {seen.step_s:.0f} | {_parts(seen)} |"
        )
    return lines


def _others(shipped: Efficiencies) -> list[str]:
    lines = [
        "| rows that are not fitted | published, s | predicted, s | error | "
        "rollout, score, update, sync, s |",
        "|---|---|---|---|---|",
    ]
    for row in OTHERS:
        seen = predict(row, shipped)
        version = "" if row.version == "0.6" else f" (NeMo-RL {row.version})"
        lines.append(
            f"| {row.name}{version} | {row.step_s:g} | {seen.step_s:.0f} | "
            f"{_error(seen.step_s, row.step_s)} | {_parts(seen)} |"
        )
    return lines


def _syncs(shipped: Efficiencies) -> list[str]:
    lines = [
        "| weight sync of another system (miles, NCCL) | published, s | one hop, s | "
        "this repository's hops, s |",
        "|---|---|---|---|",
    ]
    for name, which, published, team in SYNCS:
        counted = model(which)
        hop = counted.parameters * 2 / (_GPU.network_gbps * 1e9 * shipped.network)
        ours = publish(counted, team, "network", 2, _GPU, shipped)
        lines.append(f"| {name} | {published:g} | {hop:.1f} | {ours:.1f} |")
    return lines


def _error(predicted: float, published: float) -> str:
    return f"{100 * (predicted / published - 1):+.0f} %"


def _parts(found: Prediction) -> str:
    parts = (found.rollout_s, found.score_s, found.update_s, found.sync_s)
    return ", ".join(f"{part:.0f}" for part in parts)


_BEGIN, _END = "<!-- made by python -m megatron_fp16rl.tools.plan.fit -->", "<!-- end -->"


def between(text: str) -> str:
    """What stands between the marks in docs/planner.md."""
    return text.split(_BEGIN)[1].split(_END)[0].strip()


def _write(root: Path) -> None:
    """Puts the fit into rates.py, then the tables that follow from it into docs/planner.md."""
    fitted = fit(ROWS)
    values = ", ".join(f"{f.name}={getattr(fitted, f.name)!r}" for f in fields(Efficiencies))
    code = root / "megatron_fp16rl/tools/plan/rates.py"
    code.write_text(
        re.sub(r"^SHIPPED = .*$", f"SHIPPED = Efficiencies({values})", code.read_text(), flags=re.M)
    )
    page = root / "docs/planner.md"
    text = page.read_text()
    page.write_text(text.replace(between(text), tables(fitted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into rates.py and docs/planner.md")
    if parser.parse_args().write:
        _write(Path(__file__).parents[3])
        return
    fitted = fit(ROWS)
    print(fitted, tables(fitted), sep="\n\n")


if __name__ == "__main__":
    main()
