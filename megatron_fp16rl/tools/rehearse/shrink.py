"""The small recipe of a rehearsal. Nothing here reads or writes a file."""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.metrics import gates
from megatron_fp16rl.platform import cpu
from megatron_fp16rl.recipe import DatasetTask, Layout, MathVerifyReward, Recipe
from megatron_fp16rl.rollout.evaluation.suites import parse
from megatron_fp16rl.tools.rehearse.fold import Fold, fold
from megatron_fp16rl.tools.rehearse.small_model import POSITIONS, small_config

STEPS = 2  # before the checkpoint; one more follows
VOCABULARY = 16  # of which the tokenizer needs fewer, as real ones do
PROMPT_TOKENS, NEW_TOKENS = 64, 24
_LEARNING_RATE = 1e-3  # of a step of one update
_SAMPLES, _SEQUENCES, _MOST_UPDATES = 4, 32, 16
_USUAL_PROMPT = 1024  # tokens, where a recipe has no limit
_PATIENCE_S = 900  # of a busy machine
# Options of the engines that mean nothing without a GPU, by the beginning of their names.
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
    """What is rehearsed.

    recipe      runs as it is, once materials.write has made what it names
    config      values of the small model's transformers configuration
    folded      numbers of the recipe that became smaller
    left_out    what of the recipe is not rehearsed, or by something else, in sentences
    """

    recipe: Recipe
    config: dict[str, object]
    folded: list[Fold]
    left_out: list[str]


def shrink(recipe: Recipe, config: object, ranks: int, folder: Path) -> Small:
    """The recipe on at most `ranks` ranks, with a small model and batch, and its files in `folder`.

    config: the model's transformers configuration. Algorithm, precision, loss scale, sync,
    recomputation, adapters and router replay stay.
    """
    layout, folded = fold(recipe.learner, ranks)
    stages, layers = _stages(recipe.learner, layout)
    here = Layout.model_validate({**layout, **stages})
    small = small_config(config, layers, VOCABULARY)
    values, left_out = recipe.model_dump(), []
    values |= {"base": None, "model": {"path": str(folder / "model")}, "warm_start": None}
    values |= {"description": f"rehearsal of {recipe.name}", "provenance": None}
    values |= {"slurm": None, "task": _task(recipe.task, folder)}
    values["gates"] = _gates(recipe, left_out)
    values["learner"] |= layout | stages | _learner(recipe, layers, here, left_out)
    values["rollout"] |= _rollout(recipe, here, left_out)
    batch, more = _batch(recipe, here)
    values["rollout"] |= {k: batch[k] for k in ("prompts", "samples")}
    values["learner"]["global_batch_size"] = batch["global_batch_size"]
    values["algorithm"]["overlong"] = _overlong(recipe)
    values["sync"]["verify"] = "always"
    values["checkpoint"] |= {"every": STEPS, "keep_last": 2}
    values["trainer"] |= _trainer(recipe, folder)
    left_out += more + _said(recipe)
    return Small(
        Recipe.model_validate(values),
        small,
        folded + _sizes(config, small) + _numbers(recipe, values),
        left_out,
    )


def _stages(full: Layout, folded: dict[str, object]) -> tuple[dict[str, object], int]:
    """Values of the layout's uneven stages, if it has them, and the number of layers.

    Of two stages, one then has a layer in each chunk and the other has two.
    """
    given = full.uneven_stages
    pipeline, chunks = folded["pipeline_parallel"], folded["model_chunks"]
    if pipeline == 1 or not given:
        return dict.fromkeys(given), max(2, pipeline * chunks)
    if len(given) == 1:
        return dict.fromkeys(given, chunks), 3 * chunks
    last_is_smaller = full.last_stage_layers < full.first_stage_layers
    first, last = (2, 1) if last_is_smaller else (1, 2)
    return {"first_stage_layers": first * chunks, "last_stage_layers": last * chunks}, 3 * chunks


def _task(task: object, folder: Path) -> dict[str, object]:
    """Made-up problems, put and graded as the recipe's are, as far as that can be had here."""
    values = {"kind": "dataset", "path": str(folder / "problems.jsonl"), "instruction": ""}
    values["template"] = getattr(task, "template", "none")
    values["template_options"] = getattr(task, "template_options", None)
    if getattr(task, "max_prompt_tokens", None):
        values["max_prompt_tokens"] = PROMPT_TOKENS
    if isinstance(task, DatasetTask) and isinstance(task.reward, MathVerifyReward):
        values["reward"] = task.reward.model_dump()
    else:
        values["reward"] = {"kind": "function", "path": f"{folder / 'reward.py'}:score"}
    return values


def _gates(recipe: Recipe, left_out: list[str]) -> list[dict[str, object]]:
    """The recipe's metrics with bounds that no random model leaves: whether they are there is seen."""
    suites = [parse(suite.suite) for suite in recipe.trainer.suites]
    of_suites = {f"eval/{suite.name}/{suite.label}" for suite in suites}
    for gate in recipe.gates:
        if gate.metric in of_suites:
            left_out.append(f"gate on {gate.metric}: trainer.suites are left out")
    return [
        {"metric": gate.metric, "above": sys.float_info.max}
        for gate in gates.of(recipe)
        if gate.metric not in of_suites
    ]


def _learner(recipe: Recipe, layers: int, here: Layout, left_out: list[str]) -> dict[str, object]:
    settings = recipe.learner
    options, dropped = _without(settings.megatron, _GPU_MEGATRON)
    if dropped:
        left_out.append(f"learner.megatron: {', '.join(dropped)} (for GPUs)")
    if options.get("recompute_num_layers"):
        most = layers // (here.pipeline_parallel * here.model_chunks)
        options["recompute_num_layers"] = max(1, min(options["recompute_num_layers"], most))
    values: dict[str, object] = {"megatron": options}
    prompt = getattr(recipe.task, "max_prompt_tokens", None) or _USUAL_PROMPT
    longest = prompt + recipe.rollout.max_new_tokens
    tokens = PROMPT_TOKENS + NEW_TOKENS
    sequences = max(1.0, settings.micro_batch_tokens / longest)
    values["micro_batch_tokens"] = round(sequences * tokens)
    if settings.pad_to_multiple_of is not None:
        values["pad_to_multiple_of"] = max(1, round(settings.pad_to_multiple_of * tokens / longest))
    faster = {"lr": _learning_rate(recipe), "warmup_updates": 0}
    values["optimizer"] = {**settings.optimizer.model_dump(), **faster}
    if settings.lora is not None:
        rank = min(settings.lora.rank, 8)
        alpha = settings.lora.alpha * rank / settings.lora.rank
        values["lora"] = {**settings.lora.model_dump(), "rank": rank, "alpha": alpha}
    return values


def _rollout(recipe: Recipe, here: Layout, left_out: list[str]) -> dict[str, object]:
    settings = recipe.rollout
    options, dropped = _without(settings.sglang, _GPU_SGLANG)
    if dropped:
        left_out.append(f"rollout.sglang: {', '.join(dropped)} (for GPUs)")
    options["context_length"] = POSITIONS
    return {
        "max_new_tokens": NEW_TOKENS,
        "servers": min(2, settings.servers),
        "tensor_parallel": min(2, settings.tensor_parallel),
        "host": "127.0.0.1",
        "replay": None,
        "record": True,
        "sglang": options,
        # A server that dies is a finding.
        "max_restarts": 0,
        "start_timeout_s": max(_PATIENCE_S, settings.start_timeout_s),
    }


def _batch(recipe: Recipe, here: Layout) -> tuple[dict[str, int], list[str]]:
    """Prompts, samples and global batch: as many updates a step as the recipe has, if not too many."""
    rollout, ranks = recipe.rollout, here.data_parallel
    updates, kept = _updates(recipe)
    samples = min(rollout.samples, _SAMPLES)
    # The interleaved schedule wants a micro-batch for each stage.
    unit = ranks * (here.pipeline_parallel if here.model_chunks > 1 else 1)
    for size in itertools.count(unit, unit):
        sequences = kept * size
        prompts, rest = divmod(sequences, samples)
        if sequences >= _SEQUENCES and not rest and prompts % ranks == 0:
            break
    said = [f"{updates} updates a step: {kept} are made"] if kept != updates else []
    return {"prompts": prompts, "samples": samples, "global_batch_size": size}, said


def _updates(recipe: Recipe) -> tuple[int, int]:
    """Of a step: the recipe's, and how many are made."""
    rollout = recipe.rollout
    updates = rollout.prompts * rollout.samples // recipe.learner.global_batch_size
    return updates, min(updates, _MOST_UPDATES)


def _learning_rate(recipe: Recipe) -> float:
    """Moves the weights in three steps, and does not break them however many updates a step has."""
    return round(_LEARNING_RATE / _updates(recipe)[1] ** 0.5, 6)


def _overlong(recipe: Recipe) -> dict[str, object] | None:
    overlong = recipe.algorithm.overlong
    if overlong is None:
        return None
    share = overlong.buffer / recipe.rollout.max_new_tokens
    return {**overlong.model_dump(), "buffer": max(1, round(share * NEW_TOKENS))}


def _trainer(recipe: Recipe, folder: Path) -> dict[str, object]:
    steps = max(recipe.trainer.steps, 1000)  # the first attempt does not end by itself
    return {
        "steps": steps,
        "eval_every": STEPS,  # then gates on metrics that are not there are refused
        "eval_prompts": 16,
        "suites": [],
        "run_root": str(folder),
        "max_restarts": 0,
        "step_timeout_s": _PATIENCE_S,
    }


def _said(recipe: Recipe) -> list[str]:
    """What is left out of every rehearsal, where the recipe has it."""
    task = recipe.task
    data = getattr(task, "path", None) or getattr(task, "name", None) or task.kind
    reward = getattr(getattr(task, "reward", None), "kind", None) or task.kind
    graded = (
        "by math-verify" if reward == "math_verify" else "by a function that any text satisfies"
    )
    lines = [
        f"the task's own problems ({data}): made-up ones, graded {graded}",
        f"learning rate {recipe.learner.optimizer.lr:g}: {_learning_rate(recipe):g} and no warm-up, so "
        "that three steps move the weights",
    ]
    for what, there in (
        ("warm start", recipe.warm_start is not None),
        ("bounds of gates: their metrics are looked for", bool(recipe.gates)),
        ("trainer.suites", bool(recipe.trainer.suites)),
        ("slurm (fp16rl submit --dry-run checks it)", recipe.slurm is not None),
        ("rollout.replay: servers sample", recipe.rollout.replay is not None),
    ):
        if there:
            lines.append(what)
    return lines


def _sizes(config: object, small: dict[str, object]) -> list[Fold]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    return [
        Fold(f"model {name}", getattr(config, name), small[name])
        for name in names
        if name in small and getattr(config, name, None) != small[name]
    ]


def _numbers(recipe: Recipe, values: dict) -> list[Fold]:
    found = []
    for section, names in (
        ("rollout", ("servers", "tensor_parallel", "prompts", "samples", "max_new_tokens")),
        ("learner", ("first_stage_layers", "last_stage_layers")),
        ("learner", ("global_batch_size", "micro_batch_tokens")),
    ):
        for name in names:
            full = getattr(getattr(recipe, section), name)
            if full != values[section][name]:
                found.append(Fold(f"{section}.{name}", full, values[section][name]))
    return found


def _without(
    options: dict[str, object], beginnings: tuple[str, ...]
) -> tuple[dict[str, object], list[str]]:
    """Options whose names do not begin so, and the names of the others."""
    dropped = [name for name in options if name.startswith(beginnings)]
    return {k: v for k, v in options.items() if k not in dropped}, dropped
