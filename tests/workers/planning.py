"""What runs on the ranks of tests/unit/test_planner.py."""

import gc
from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.recipe import Recipe
from tests import models

SEQ = 64
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "head_dim": 32,
    "max_position_embeddings": SEQ,
}


def recipe(dtype: str, learner: dict, lora: dict | None = None) -> Recipe:
    """16 sequences an update, two at once."""
    return models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": SEQ - 6},
        learner={
            "global_batch_size": 16,
            "micro_batch_tokens": 2 * SEQ,
            "pad_to_multiple_of": 1,  # as the learner on CPUs has it
            "lora": lora,
            **learner,
        },
        precision={"dtype": dtype},
    )


def measured(folder: str, dtype: str, learner: dict, lora: dict | None = None) -> dict:
    """Bytes that a real learner has on this rank between updates, and more than that in one."""
    from megatron.core import parallel_state

    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.parallel import initialize

    wanted = recipe(dtype, learner, lora)
    world = initialize(wanted.learner, 0)
    sequences = [[1 + (i * 7 + t) % 90 for t in range(SEQ)] for i in range(16)]
    rows = torch.arange(16).chunk(world.data.size)[world.data.rank]
    batch = Batch.from_token_ids(sequences).rows(rows)
    before = _storages()
    made = Learner.from_recipe(wanted, Path(folder), world)
    made.supervised_step(batch)  # Adam has its state from now on
    parallel_state.get_global_memory_buffer().buffer.clear()  # scores of the local attention
    for gpt in made.model.gpt_models:
        gpt.set_input_tensor([None])  # of the last micro-batch
    static = sum(size for at, size in _storages().items() if at not in before)
    with models.LiveBytes() as live:
        made.supervised_step(batch)
    return {"static": static, "training": live.peak}


def _storages() -> dict[int, int]:
    """Bytes of all tensors that Python knows of, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def planned(folder: str, cases: list[dict], without: str = "") -> list[list[dict]]:
    """What the planner says of the same: [case][pipeline stage]. without: one of its patches."""
    from megatron_fp16rl import platform
    from megatron_fp16rl.models.config import load_config

    platform.plan_only()
    from megatron_fp16rl.platform import meta
    from megatron_fp16rl.tools.plan.memory import learner_memory

    meta.PATCHES = [patch for patch in meta.PATCHES if patch.name != without]
    found = []
    for case in cases:
        # A rank that has all experts has all tokens, however they are spread.
        load = 1.0 if "expert_parallel" in case["learner"] else 1.5
        with meta.assuming(attention="local", expert_load=load):
            memory = learner_memory(recipe(**case), load_config(folder))
        assert not memory.proof.faults
        found.append(
            [
                {"static": r.static, "training": r.training, "in_flight": r.in_flight}
                for r in memory.ranks
            ]
        )
    return found


def proofs() -> tuple[dict[str, int], dict[str, list[str]]]:
    """Tensors of every family, proved at 16 ranks; what is said of exports that are wrong."""
    from transformers import AutoConfig

    from megatron_fp16rl import platform

    platform.plan_only()
    from megatron_fp16rl.tools.plan.memory import learner_memory
    from megatron_fp16rl.tools.plan.proof import prove
    from megatron_fp16rl.tools.plan.stage import build

    layout = {"ranks": 16, "tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2}
    counts = {}
    for name, shape in {**models.FAMILIES, **models.MOE_FAMILIES}.items():
        config = AutoConfig.for_model(vocab_size=99, **shape)
        experts = {"expert_parallel": 4} if name in models.MOE_FAMILIES else {}
        proof = learner_memory(recipe("fp16", {**layout, **experts}), config).proof
        assert proof.faults == [], (name, proof.faults)
        counts[name] = proof.tensors
    config = AutoConfig.for_model(vocab_size=99, **models.FAMILIES["qwen3"])
    right = build(recipe("fp16", {"ranks": 1}), config, 0, None).exported
    norm = "model.norm.weight"
    others = [tensors for tensors in right if norm not in dict(tensors)]
    wrong = {
        "left out": others,
        "twice": [*right, [(norm, torch.Size([64]))]],
        "reshaped": [*others, [(norm, torch.Size([3]))]],
        "unknown": [*right, [("x", torch.Size([1]))]],
    }
    return counts, {name: prove(exported, config).faults for name, exported in wrong.items()}


def catalogue(paths: list[str]) -> dict[str, dict]:
    """Plans of recipes, by name. What two recipes have in common is planned once."""
    from megatron_fp16rl.models.build import model_config
    from megatron_fp16rl.models.check import parameters
    from megatron_fp16rl.recipe import load
    from megatron_fp16rl.tools.plan.plan import plan

    found, known = {}, {}
    for path in paths:
        wanted = load(path)
        # Algorithms apart, and what an optimizer is set to, the same is built and run.
        key = wanted.model_copy(
            update={"algorithm": None, "name": "", "description": "", "provenance": None}
        ).model_dump_json()
        if key not in known:
            made = plan(wanted, wanted.slurm.gpu, search=False)
            exported = {name for name, _ in made.learner.proof.found}
            whole = parameters(model_config(wanted.model))
            known[key] = {
                "reasons": made.reasons,
                "margin_gib": (made.gpu.memory - made.learner.worst.peak) / 2**30,
                "tensors": len(exported),
                "of_transformers": len(whole),
                "parameters_b": sum(s.numel() for _, s in made.learner.proof.found) / 1e9,
                "of_transformers_b": sum(s.numel() for s in whole.values()) / 1e9,
            }
        found[wanted.name] = known[key]
    return found


def refusals(path: str, settings: list[str]) -> list[str]:
    """What is said of a recipe with one setting changed, of which nothing can come."""
    from megatron_fp16rl.recipe import RecipeError, load
    from megatron_fp16rl.tools.plan.plan import plan

    said = []
    for setting in settings:
        try:
            found = plan(load(path, [setting, "slurm.rollout_nodes=4"]), "h100-80gb", search=False)
            said.append("\n".join(found.reasons))
        except RecipeError as error:
            said.append(str(error))
    return said
