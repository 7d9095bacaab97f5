"""What runs on the ranks of tests/ranks/test_plan.py, and of the test that all recipes fit."""

from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch, compact
from megatron_fp16rl.recipe import Recipe
from tests import models

SEQ = 64
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "head_dim": 32,
    "max_position_embeddings": SEQ,
}


def recipe(learner: dict, router_replay: bool = False, head: str | None = None) -> Recipe:
    """FP16, eight sequences an update, two at once."""
    return models.recipe(
        rollout={
            "prompts": 4,
            "samples": 4,
            "max_new_tokens": SEQ - 6,
            "router_replay": router_replay,
        },
        learner={
            "global_batch_size": 8,
            "micro_batch_tokens": 2 * SEQ,
            "pad_to_multiple_of": 1,  # as the learner on CPUs has it
            **learner,
        },
        precision={"dtype": "fp16", "head": head},
    )


def measured(folder: str, **case) -> dict:
    """Bytes that a real learner holds on this rank between updates, and more than that in one."""
    from megatron.core import parallel_state

    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.parallel import initialize
    from megatron_fp16rl.tools.plan.live_bytes import LiveBytes

    settings = recipe(**case)
    world = initialize(settings.learner, 0)
    sequences = [[1 + (i * 7 + t) % 90 for t in range(SEQ)] for i in range(8)]
    rows = torch.arange(8).chunk(world.data.size)[world.data.rank]
    batch = Batch.from_token_ids(sequences).rows(rows)
    with LiveBytes("cpu") as always:
        learner = Learner.from_recipe(settings, Path(folder), world)
        if learner.router_replay:
            layers, top_k = len(learner.router_replay.layers), learner.model.config.moe_router_topk
            experts = torch.arange(top_k).expand(len(batch), SEQ, layers, top_k)
            batch = batch.replace(experts=compact(experts, learner.model.config.num_moe_experts))
        learner.supervised_update(batch)  # Adam has its state from now on
        parallel_state.get_global_memory_buffer().buffer.clear()  # scores of the local attention
        for gpt in learner.model.gpt_models:
            gpt.set_input_tensor([None])  # of the last micro-batch
    static = always.now
    with LiveBytes("cpu") as live:
        learner.supervised_update(batch)
    return {"static": static, "training": live.peak}


def planned(cases: list[tuple[str, dict]], without: str = "") -> list[list[dict]]:
    """The planner's bytes of folders' models: [case][pipeline stage]. without: one of its patches."""
    from megatron_fp16rl import platform
    from megatron_fp16rl.models.config import load_config

    platform.plan_only()
    from megatron_fp16rl.platform import meta
    from megatron_fp16rl.tools.plan.memory import learner_memory

    meta.PATCHES = [patch for patch in meta.PATCHES if patch.name != without]
    plans = []
    for folder, case in cases:
        # A rank that has all experts has all tokens, however they are spread.
        load = 1.0 if "expert_parallel" in case["learner"] else 1.5
        with meta.assuming(attention="local", expert_load=load):
            memory = learner_memory(recipe(**case), load_config(folder))
        assert not memory.faults
        plans.append(
            [
                {"static": r.static, "training": r.training, "activations": r.activations}
                for r in memory.ranks
            ]
        )
    return plans


def exports() -> tuple[dict[str, int], dict[str, list[str]]]:
    """Tensors of every family at 16 ranks, all checked; and the faults of exports that are wrong."""
    from transformers import AutoConfig

    from megatron_fp16rl import platform

    platform.plan_only()
    from megatron_fp16rl.tools.plan.memory import faults_of, learner_memory

    layout = {"ranks": 16, "tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2}
    counts = {}
    for name, shape in {**models.FAMILIES, **models.MOE_FAMILIES}.items():
        config = AutoConfig.for_model(vocab_size=99, **shape)
        experts = {"expert_parallel": 4} if name in models.MOE_FAMILIES else {}
        memory = learner_memory(recipe({**layout, **experts}), config)
        assert memory.faults == [], (name, memory.faults)
        counts[name] = len(memory.exported)
    config = AutoConfig.for_model(vocab_size=99, **models.FAMILIES["qwen3"])
    right = learner_memory(recipe({"ranks": 1}), config).exported
    norm = "model.norm.weight"
    others = [tensor for tensor in right if tensor[0] != norm]
    wrong = {
        "left out": others,
        "twice": [*right, (norm, torch.Size([64]))],
        "reshaped": [*others, (norm, torch.Size([3]))],
        "unknown": [*right, ("x", torch.Size([1]))],
    }
    return counts, {name: faults_of(exported, config) for name, exported in wrong.items()}


def catalogue(paths: list[str]) -> dict[str, list[str]]:
    """Why recipes cannot run, by name.

    Of recipes with one model and layout, that is planned which takes the most memory: of few data-parallel
    ranks, each with large shards; with records of experts, and fp32 logits.
    """
    from megatron_fp16rl.recipe import load
    from megatron_fp16rl.tools.plan.plan import plan

    def needs(recipe: Recipe) -> tuple:
        head = recipe.precision.head is not None
        return -recipe.learner.ranks, recipe.rollout.router_replay, head

    reasons, known = {}, {}
    for recipe in sorted(map(load, paths), key=needs, reverse=True):
        rollout = {"servers": 0, "router_replay": False}
        learner = {"ranks": 0, "global_batch_size": 0, "optimizer": None}
        same = (
            *(recipe.model, recipe.task, recipe.sync, recipe.precision.dtype, recipe.slurm.gpu),
            recipe.rollout.model_copy(update=rollout),
            recipe.learner.model_copy(update=learner),
        )
        if repr(same) not in known:
            known[repr(same)] = recipe, plan(recipe, recipe.slurm.gpu, search=False).reasons
        planned, reasons[recipe.name] = known[repr(same)]
        assert all(a >= b for a, b in zip(needs(planned), needs(recipe), strict=True)), recipe.name
    return reasons


def refusals(path: str, changes: list[str], settings: list[str]) -> list[str]:
    """Why a recipe, with its settings, is refused with one more changed, for each."""
    from megatron_fp16rl.recipe import RecipeError, load
    from megatron_fp16rl.tools.plan.plan import plan

    reasons = []
    for change in changes:
        try:
            answer = plan(load(path, [*settings, change]), "h100-80gb", search=False)
            reasons.append("\n".join(answer.reasons))
        except RecipeError as error:
            reasons.append(str(error))
    return reasons


def command(arguments: list[str]) -> list:
    """Exit code and output of `fp16rl plan`."""
    from typer.testing import CliRunner

    from megatron_fp16rl.cli import app

    result = CliRunner().invoke(app, ["plan", *arguments])
    return [result.exit_code, result.output]
