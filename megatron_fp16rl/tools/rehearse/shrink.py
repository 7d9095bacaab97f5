"""The small copy of a recipe that a rehearsal runs. Nothing here reads or writes a file."""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_fp16rl.metrics import gates
from megatron_fp16rl.platform import cpu
from megatron_fp16rl.recipe import DatasetTask, Layout, MathVerifyReward, Recipe
from megatron_fp16rl.tools.rehearse.small_model import POSITIONS, small_config

STEPS = 2  # before the checkpoint; one more step follows the resume
_PROMPT_TOKENS, _NEW_TOKENS = 64, 24
_DEFAULT_PROMPT_TOKENS = 1024  # assumed where the recipe has no task.max_prompt_tokens
_MAX_SAMPLES, _MIN_SEQUENCES, _MAX_UPDATES = 4, 32, 16
_LEARNING_RATE = 1e-3  # of a step with one update: moves a random model in three steps
_TIMEOUT_S = 900  # on a busy machine

# Parallel axes in the order in which they are kept.
_AXES = (
    "tensor_parallel",
    "pipeline_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
    "data_parallel",
    "expert_data_parallel",
)
# Engine options that need a GPU, by the beginning of their names.
_GPU_SGLANG = (
    *("mem_fraction_static", "attention_backend", "prefill_attention", "decode_attention"),
    *("sampling_backend", "cuda_graph", "disable_cuda_graph", "kv_cache_dtype", "quantization"),
    *("ep_", "moe_", "deepep", "enable_dp_attention", "enable_ep", "dp_size", "cpu_offload"),
    *("flashinfer", "enable_flashinfer", "enable_nccl", "nccl", "enable_torch_compile"),
    *("disable_custom_all_reduce", "enable_two_batch_overlap", "enable_mixed_chunk"),
)
_GPU_MEGATRON = (
    *cpu.transformer_options(),
    *("attention_backend", "moe_router_fusion", "moe_token_dispatcher_type", "moe_enable_deepep"),
    *("moe_flex", "moe_shared_expert_overlap", "tp_comm_overlap", "cpu_offloading", "fp8"),
    *("enable_cuda_graph", "cuda_graph", "external_cuda_graph", "fused_", "use_te"),
)


@dataclass(frozen=True)
class Small:
    """What a rehearsal runs.

    recipe      complete, once small_model.write has written the files that it names
    config      values of the small model's transformers configuration
    folded      numbers that became smaller: {"what": key, "full": number, "here": number}
    left_out    parts of the recipe that are replaced or not rehearsed, a sentence each
    """

    recipe: Recipe
    config: dict[str, Any]
    folded: list[dict[str, Any]]
    left_out: list[str]


def shrink(recipe: Recipe, config: PretrainedConfig, ranks: int, folder: Path) -> Small:
    """The recipe on at most `ranks` ranks, with a small model and batch, and its files in `folder`.

    config: of the full model. Algorithm, precision, loss scale, weight sync, recomputation, adapters
    and router replay stay as they are.
    """
    fields, layers = fold(recipe.learner, ranks)
    layout = Layout.model_validate(fields)
    left_out = _replaced(recipe)
    values = recipe.model_dump()
    values |= {"base": None, "warm_start": None, "slurm": None, "provenance": None}
    values |= {"description": f"rehearsal of {recipe.name}"}
    values |= {"model": {"path": str(folder / "model")}, "task": _task(recipe, folder)}
    values["gates"] = _gates(recipe, left_out)
    layers_of_stage = layers // (layout.pipeline_parallel * layout.model_chunks)
    values["learner"] |= fields | _learner(recipe, layers_of_stage, left_out)
    values["rollout"] |= _rollout(recipe, left_out)
    prompts, samples, batch = _batch(recipe, layout)
    values["rollout"] |= {"prompts": prompts, "samples": samples}
    values["learner"]["global_batch_size"] = batch
    if (overlong := recipe.algorithm.overlong) is not None:
        share = overlong.buffer / recipe.rollout.max_new_tokens
        values["algorithm"]["overlong"]["buffer"] = max(1, round(share * _NEW_TOKENS))
    values["sync"]["verify"] = "always"
    values["checkpoint"] |= {"every": STEPS, "keep_last": 2}
    values["trainer"] |= {
        "steps": max(recipe.trainer.steps, 1000),  # the first attempt is killed, and must not end
        "eval_every": STEPS,  # gates on metrics that do not exist are refused after an evaluation
        "eval_prompts": 16,
        "suites": [],
        "run_root": str(folder),
        "max_restarts": 0,  # a rank that dies is a result
        "step_timeout_s": _TIMEOUT_S,
    }
    small, model = Recipe.model_validate(values), small_config(config, layers)
    return Small(small, model, _folded(recipe, small, config, model), left_out)


def fold(full: Layout, ranks: int) -> tuple[dict[str, Any], int]:
    """A layout on at most `ranks` ranks: values of Layout's fields, and the model's number of layers.

    An axis that is more than 1 becomes 2 while ranks last, in the order of _AXES, else 1. As in
    Megatron, the ranks that share experts are tensor- or data-parallel for the rest of the model.
    """
    experts = full.expert_parallel * full.expert_tensor_parallel
    expert_data = full.ranks // (experts * full.pipeline_parallel) if experts > 1 else 1
    sizes = dict.fromkeys(_AXES, 1)
    for axis in _AXES:
        is_wide = (expert_data if axis == "expert_data_parallel" else getattr(full, axis)) > 1
        wider = {**sizes, axis: 2 if is_wide else 1}
        if _world_size(wider) <= ranks:
            sizes = wider
    pipeline = sizes["pipeline_parallel"]
    chunks = min(full.model_chunks, 2) if pipeline > 1 else 1
    layers = max(2, pipeline * chunks)
    fields: dict[str, Any] = {
        "ranks": _world_size(sizes),
        **{axis: sizes[axis] for axis in _AXES[:4]},
        "sequence_parallel": full.sequence_parallel and sizes["tensor_parallel"] > 1,
        "model_chunks": chunks,
        "first_stage_layers": None,
        "last_stage_layers": None,
    }
    if pipeline > 1 and full.uneven_stages:
        layers = 3 * chunks  # one stage has a layer in each chunk, the other two
        fields |= dict(zip(full.uneven_stages, (chunks, 2 * chunks), strict=False))
    return fields, layers


def _world_size(sizes: dict[str, int]) -> int:
    """The fewest ranks with these sizes of the axes."""
    dense = sizes["tensor_parallel"] * sizes["pipeline_parallel"]
    sparse = sizes["expert_parallel"] * sizes["expert_tensor_parallel"] * sizes["pipeline_parallel"]
    fewest = max(dense * sizes["data_parallel"], sparse * sizes["expert_data_parallel"])
    unit = math.lcm(dense, sparse)
    return unit * math.ceil(fewest / unit)


def _task(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Made-up problems with the recipe's template, graded by math-verify if the recipe's are."""
    task = recipe.task
    values: dict[str, Any] = {
        "kind": "dataset",
        "path": str(folder / "problems.jsonl"),
        "instruction": "",
        "template": getattr(task, "template", "none"),
        "template_options": getattr(task, "template_options", None),
        "reward": {"kind": "function", "path": f"{folder / 'reward.py'}:score"},
    }
    if getattr(task, "max_prompt_tokens", None):
        values["max_prompt_tokens"] = _PROMPT_TOKENS
    if isinstance(task, DatasetTask) and isinstance(task.reward, MathVerifyReward):
        values["reward"] = task.reward.model_dump()
    return values


def _gates(recipe: Recipe, left_out: list[str]) -> list[dict[str, Any]]:
    """The recipe's gates with a bound that no random model breaks: only the metrics are looked for."""
    kept = []
    for gate in gates.of(recipe):
        if gate.metric.startswith("eval/") and gate.metric.count("/") > 1:  # eval/SUITE/METRIC
            left_out.append(f"gate on {gate.metric}: trainer.suites are left out")
        else:
            kept.append({"metric": gate.metric, "above": sys.float_info.max})
    return kept


def _learner(recipe: Recipe, layers_of_stage: int, left_out: list[str]) -> dict[str, Any]:
    settings = recipe.learner
    options = _without_gpu("learner.megatron", settings.megatron, _GPU_MEGATRON, left_out)
    if recomputed := options.get("recompute_num_layers"):
        options["recompute_num_layers"] = max(1, min(recomputed, layers_of_stage))
    # As many sequences fit a micro-batch as in the full recipe.
    prompt = getattr(recipe.task, "max_prompt_tokens", None) or _DEFAULT_PROMPT_TOKENS
    sequences = settings.micro_batch_tokens / (prompt + recipe.rollout.max_new_tokens)
    optimizer = settings.optimizer.model_dump() | {"lr": _learning_rate(recipe)}
    values: dict[str, Any] = {
        "megatron": options,
        "micro_batch_tokens": round(max(1.0, sequences) * (_PROMPT_TOKENS + _NEW_TOKENS)),
        "pad_to_multiple_of": None,
        "optimizer": optimizer | {"warmup_updates": 0},
    }
    if (lora := settings.lora) is not None:
        rank = min(lora.rank, 8)
        scaled = {"rank": rank, "alpha": lora.alpha * rank / lora.rank}
        values["lora"] = {**lora.model_dump(), **scaled}
    return values


def _rollout(recipe: Recipe, left_out: list[str]) -> dict[str, Any]:
    settings = recipe.rollout
    options = _without_gpu("rollout.sglang", settings.sglang, _GPU_SGLANG, left_out)
    return {
        "max_new_tokens": _NEW_TOKENS,
        "servers": min(2, settings.servers),
        "tensor_parallel": min(2, settings.tensor_parallel),
        "host": "127.0.0.1",
        "replay": None,
        "record": True,
        "sglang": {**options, "context_length": POSITIONS},
        "max_restarts": 0,  # a server that dies is a result
        "start_timeout_s": max(_TIMEOUT_S, settings.start_timeout_s),
    }


def _batch(recipe: Recipe, layout: Layout) -> tuple[int, int, int]:
    """Prompts, samples and global batch size, with as many updates a step as the recipe, up to 16."""
    ranks, updates = layout.data_parallel, min(_updates(recipe), _MAX_UPDATES)
    samples = min(recipe.rollout.samples, _MAX_SAMPLES)
    # The interleaved schedule needs a micro-batch for each pipeline rank.
    unit = ranks * (layout.pipeline_parallel if layout.model_chunks > 1 else 1)
    for batch in itertools.count(unit, unit):
        prompts, rest = divmod(updates * batch, samples)
        if updates * batch >= _MIN_SEQUENCES and not rest and prompts % ranks == 0:
            return prompts, samples, batch
    raise AssertionError("unreachable: some multiple divides")


def _updates(recipe: Recipe) -> int:
    return recipe.rollout.prompts * recipe.rollout.samples // recipe.learner.global_batch_size


def _learning_rate(recipe: Recipe) -> float:
    """Moves the weights in three steps, and does not break them with many updates a step."""
    return round(_LEARNING_RATE / min(_updates(recipe), _MAX_UPDATES) ** 0.5, 6)


def _replaced(recipe: Recipe) -> list[str]:
    """What every rehearsal replaces or leaves out, where the recipe has it."""
    task = recipe.task
    data = getattr(task, "path", None) or getattr(task, "name", None) or task.kind
    lines = [
        f"the task's problems ({data}): made-up ones in their place",
        f"learning rate {recipe.learner.optimizer.lr:g}: {_learning_rate(recipe):g} without warm-up, "
        "so that three steps move the weights",
    ]
    lines += [
        line
        for line, is_set in (
            ("warm start", recipe.warm_start is not None),
            ("bounds of gates: only their metrics are looked for", bool(recipe.gates)),
            ("trainer.suites", bool(recipe.trainer.suites)),
            ("slurm (fp16rl submit --dry-run checks it)", recipe.slurm is not None),
            ("rollout.replay: servers sample", recipe.rollout.replay is not None),
        )
        if is_set
    ]
    if (updates := _updates(recipe)) > _MAX_UPDATES:
        lines.append(f"{updates} updates a step: {_MAX_UPDATES} are made")
    return lines


def _without_gpu(
    key: str, options: dict[str, Any], gpu_only: tuple[str, ...], left_out: list[str]
) -> dict[str, Any]:
    """Engine options without those that need a GPU."""
    dropped = [name for name in options if name.startswith(gpu_only)]
    if dropped:
        left_out.append(f"{key}: {', '.join(dropped)} (for GPUs)")
    return {name: value for name, value in options.items() if name not in dropped}


def _folded(
    recipe: Recipe, small: Recipe, config: PretrainedConfig, model: dict[str, Any]
) -> list[dict[str, Any]]:
    """All whole numbers and flags of learner, rollouts and model that became smaller."""
    full = recipe.flat()
    pairs = [
        (key, full.get(key), value)
        for key, value in small.flat().items()
        if key.startswith(("learner.", "rollout.")) and not key.endswith("max_restarts")
    ]
    pairs += [(f"model.{key}", getattr(config, key, None), value) for key, value in model.items()]
    return [
        {"what": key, "full": before, "here": after}
        for key, before, after in pairs
        if isinstance(before, int) and isinstance(after, int) and after < before
        if not key.endswith("_token_id")
    ]
