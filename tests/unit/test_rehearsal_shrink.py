"""Large recipes, shrunk: the small one is like the large one in everything that is not size."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.data.tasks.templates import R1
from megatron_fp16rl.metrics.gates import check, judge
from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.recipe import Recipe, load
from megatron_fp16rl.tools import recipes
from megatron_fp16rl.tools.rehearse import small_model
from megatron_fp16rl.tools.rehearse.shrink import shrink
from tests.conftest import ROOT

LARGE = [path for path in recipes.paths() if path.parent.name in ("dense", "moe")]
SHAPES = {
    path.stem: json.loads(path.read_text()) for path in (ROOT / "recipes" / "models").glob("*.json")
}
SHAPES["qwen3-tied"] = {**SHAPES["qwen3-8b-base"], "tie_word_embeddings": True}
MOE = {name for name, shape in SHAPES.items() if "moe_intermediate_size" in shape}
AXES = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel")
DAPO = {
    "name": "large",
    "task": {"kind": "dataset", "name": "owner/of-the-hub", "template": "qwen_math"},
    "algorithm": {"clip_high": 0.28, "overlong": {"buffer": 4096}},
    "trainer": {"steps": 400, "suites": [{"suite": "aime.jsonl:avg@32"}]},
    "gates": [{"metric": "eval/accuracy", "below": 0.5, "at_end": True}],
    "slurm": {"gpus_per_node": 0},
}


def config_of(name):
    return AutoConfig.for_model(**SHAPES[name])


def recipe(learner, rollout=None, **sections):
    """A recipe for a large model, of 512 sequences a step."""
    values = {
        **DAPO,
        "model": {"path": "owner/large"},
        "rollout": {"prompts": 64, "samples": 8, "max_new_tokens": 20480, **(rollout or {})},
        "learner": {"global_batch_size": 128, "micro_batch_tokens": 43008, **learner},
    }
    return Recipe.model_validate({**values, **sections})


def small_of(name, learner, ranks=8, **sections):
    return shrink(recipe(learner, **sections), config_of(name), ranks, Path("/there"))


@st.composite
def layouts(draw, name):
    """Any layout that divides a model."""
    shape = SHAPES[name]
    powers = st.sampled_from([1, 2, 4, 8, 16])
    tensor, pipeline = draw(powers), draw(st.sampled_from([1, 2, 4]))
    layers, uneven = shape["num_hidden_layers"], {}
    if pipeline > 1 and draw(st.booleans()):
        others = pipeline - 1
        stage = draw(st.sampled_from(["first_stage_layers", "last_stage_layers"]))
        uneven = {stage: layers - others * draw(st.integers(1, (layers - 1) // others))}
    chunks = draw(st.sampled_from([1, 2])) if pipeline > 1 and not uneven else 1
    for heads in (shape["num_key_value_heads"], shape["num_attention_heads"]):
        assume(heads % tensor == 0)
    assume(uneven or layers % (pipeline * chunks) == 0)
    experts = expert_tensor = 1
    if name in MOE:
        experts, expert_tensor = draw(powers), draw(st.sampled_from([1, 2]))
    unit = math.lcm(tensor * pipeline, experts * expert_tensor * pipeline)
    world = unit * draw(st.sampled_from([1, 2]))
    assume(64 % (world // (tensor * pipeline)) == 0)
    return {
        "ranks": world,
        "tensor_parallel": tensor,
        "sequence_parallel": tensor > 1 and (name in MOE or draw(st.booleans())),
        "pipeline_parallel": pipeline,
        "model_chunks": chunks,
        **uneven,
        "expert_parallel": experts,
        "expert_tensor_parallel": expert_tensor,
        "distributed_optimizer": draw(st.booleans()),
    }


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(SHAPES)), st.sampled_from([1, 2, 4, 8, 16]))
def test_any_recipe_shrinks_to_one_that_is_like_it(data, name, ranks):
    full = recipe(data.draw(layouts(name)))
    config = config_of(name)
    describe(config, full.learner)
    small = shrink(full, config, ranks, Path("/there"))
    layout, learner = full.learner, small.recipe.learner
    describe(AutoConfig.for_model(**small.config), learner)
    assert learner.ranks <= ranks
    if ranks == 16:  # enough for any layout
        assert all(getattr(learner, axis) == min(2, getattr(layout, axis)) for axis in AXES)
        assert (learner.data_parallel > 1) or (layout.data_parallel == 1)
    assert learner.distributed_optimizer == layout.distributed_optimizer
    assert learner.sequence_parallel == (layout.sequence_parallel and learner.tensor_parallel > 1)
    assert (learner.model_chunks > 1) == (layout.model_chunks > 1 and learner.pipeline_parallel > 1)
    if learner.pipeline_parallel > 1:
        assert set(learner.uneven_stages) == set(layout.uneven_stages)
    assert_like(small.config, config)
    rollout = small.recipe.rollout
    updates = 512 // full.learner.global_batch_size
    assert rollout.prompts * rollout.samples == updates * learner.global_batch_size


def assert_like(small, config):
    """Everything of a small model that must be as in the large one."""
    kept = ("model_type", "tie_word_embeddings", "attention_bias", "use_qk_norm", "hidden_act")
    kept += ("norm_topk_prob", "partial_rotary_factor", "decoder_sparse_step", "mlp_only_layers")
    kept += ("topk_method", "scoring_func", "routed_scaling_factor", "num_nextn_predict_layers")
    for key in kept:
        assert small.get(key) == getattr(config, key, None), key
    heads = config.num_attention_heads / config.num_key_value_heads
    assert small["num_attention_heads"] / small["num_key_value_heads"] == heads
    for key in ("q_lora_rank", "kv_lora_rank", "n_shared_experts", "first_k_dense_replace"):
        assert bool(small.get(key)) == bool(getattr(config, key, None)), key
    for key in ("rope_type", "factor"):
        assert small["rope_parameters"].get(key) == config.rope_parameters.get(key)
    if getattr(config, "n_group", 1) > 1:
        assert small["topk_group"] < small["n_group"]
        assert small["num_experts_per_tok"] // small["topk_group"] == 2
    assert small.get("first_k_dense_replace", 0) < small["num_hidden_layers"]


def test_few_ranks_keep_the_axes_that_come_first():
    learner = {"ranks": 32, "tensor_parallel": 4, "sequence_parallel": True}
    learner |= {"pipeline_parallel": 4, "expert_parallel": 8}
    kept = {}
    for ranks in (1, 2, 4, 7, 8):
        small = small_of("qwen3-30b-a3b-base", learner, ranks).recipe.learner
        kept[ranks] = (*(getattr(small, axis) for axis in AXES), small.data_parallel, small.ranks)
    assert kept == {
        1: (1, 1, 1, 1, 1, 1),
        2: (2, 1, 2, 1, 1, 2),
        4: (2, 2, 2, 1, 1, 4),
        7: (2, 2, 2, 1, 1, 4),
        8: (2, 2, 2, 1, 2, 8),
    }


def test_the_rest_of_a_recipe_stays():
    learner = {"ranks": 8, "tensor_parallel": 4, "pipeline_parallel": 2, "global_batch_size": 16}
    learner |= {"lora": {"rank": 32, "alpha": 64, "targets": ["q_proj"]}}
    learner["megatron"] = {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 6,
        "moe_permute_fusion": True,
    }
    sections = {
        "algorithm": {
            "advantage": "rloo",
            "correction": {"ratio": "token", "action": "truncate", "high": 2.0},
            "kl": {"coefficient": 0.01},
            "overlong": {"buffer": 5120},
        },
        "precision": {"dtype": "fp16", "loss_scale": {"window": 7, "hysteresis": 2}},
        "sync": {"transport": "disk"},
        "rollout": {
            "refill_rounds": 2,
            "temperature": 0.7,
            "stop": ["</answer>"],
            "servers": 16,
            "tensor_parallel": 8,
            "sglang": {"mem_fraction_static": 0.85, "context_length": 30000, "log_level": "error"},
        },
    }
    full = recipe(learner, **sections)
    result = shrink(full, config_of("qwen3-14b-base"), 8, Path("/there"))
    small = result.recipe
    for key in ("advantage", "loss", "correction", "kl", "clip_low", "clip_high"):
        assert getattr(small.algorithm, key) == getattr(full.algorithm, key)
    assert small.precision == full.precision
    assert (small.sync.transport, small.sync.verify) == ("disk", "always")
    for key in ("refill_rounds", "temperature", "stop"):
        assert getattr(small.rollout, key) == getattr(full.rollout, key)
    assert (small.rollout.servers, small.rollout.tensor_parallel) == (2, 2)
    assert small.rollout.sglang == {"context_length": 256, "log_level": "error"}
    assert small.learner.megatron["recompute_num_layers"] == 1
    assert "moe_permute_fusion" not in small.learner.megatron
    assert (small.learner.lora.rank, small.learner.lora.alpha) == (8, 16)
    share = small.algorithm.overlong.buffer / small.rollout.max_new_tokens
    assert share == pytest.approx(5120 / 20480, abs=0.03)
    assert small.task.template == full.task.template
    assert small.task.reward == full.task.reward
    left_out = " ".join(result.left_out)
    for word in ("mem_fraction_static", "moe_permute_fusion", "owner/of-the-hub", "gates", "slurm"):
        assert word in left_out
    assert "32 updates a step: 16 are made" in left_out
    folded = {fold["what"]: (fold["full"], fold["here"]) for fold in result.folded}
    assert folded["learner.tensor_parallel"] == (4, 2)
    assert folded["rollout.tensor_parallel"] == (8, 2)
    assert folded["model.num_hidden_layers"] == (40, 2)
    assert "learner.pipeline_parallel" not in folded


def test_gates_stay_but_for_those_on_suites():
    """With bounds that a random model keeps; evaluated early enough for a wrong name to be refused."""
    names = ("mismatch/kl_k3", "eval/aime/avg@32")
    gates = [{"metric": m, "below": 0.5, "window": 20, "action": "stop"} for m in names]
    small = small_of("qwen3-14b-base", {}, gates=gates)
    rows = [{"mismatch/kl_k3": value, "eval/accuracy": 0.0} for value in (0.0, 1e9)]
    assert check(small.recipe.gates, rows) == judge(small.recipe.gates, rows) == []
    assert "gate on eval/aime/avg@32: trainer.suites are left out" in small.left_out
    assert small.recipe.trainer.eval_every <= 2
    scale = [*gates, {"metric": "fp16/skipped_total", "above": 50}]
    for dtype, kept in (("fp16", 2), ("bf16", 1)):
        small = small_of("qwen3-14b-base", {}, gates=scale, precision={"dtype": dtype})
        assert len(small.recipe.gates) == kept
    assert Recipe.model_validate(yaml.safe_load(small.recipe.to_yaml())) == small.recipe


@pytest.mark.parametrize(
    ("task", "around"),
    [
        ({"template": "r1"}, R1),
        ({"template": "chat", "template_options": {"enable_thinking": False}}, ("", "\n<")),
    ],
    ids=["r1", "chat"],
)
def test_problems_have_the_recipes_template_in_few_tokens(task, around, tmp_path):
    values = {"kind": "dataset", "path": "mine.jsonl", "max_prompt_tokens": 2048, **task}
    small = shrink(recipe({}, task=values), config_of("qwen3-14b-base"), 1, tmp_path)
    small_model.write(small.recipe, small.config, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    problems = make(small.recipe.task, tokenizer, seed=0)
    for prompt in problems.training_prompts(0, 8):
        assert re.fullmatch(f"{re.escape(around[0])}[01]+={re.escape(around[1])}", prompt.text)
        assert len(prompt.ids) < 30


def test_every_large_recipe_that_ships_shrinks():
    """To eight ranks with every axis that it has, uneven stages too; of every family."""
    assert {shape["model_type"] for shape in SHAPES.values()} == set(FAMILIES)
    for path in LARGE:
        full = load(path)
        small = shrink(full, model_config(full.model), 8, Path("/there"))
        learner, layout = small.recipe.learner, full.learner
        describe(AutoConfig.for_model(**small.config), learner)
        assert learner.ranks <= 8
        for axis in (*AXES[:3], "data_parallel"):
            assert (getattr(learner, axis) > 1) == (getattr(layout, axis) > 1), (path, axis)
        assert set(learner.uneven_stages) == set(layout.uneven_stages)
        assert learner.megatron.keys() == layout.megatron.keys(), (
            "no option is left out without need"
        )
