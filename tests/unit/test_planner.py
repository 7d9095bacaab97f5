"""The planner's bytes are those of a real learner; its ranks together are transformers' model."""

import json
import re
from dataclasses import fields

import pytest

from megatron_fp16rl.recipe import Layout
from megatron_fp16rl.tools.plan.lengths import micro_batch
from megatron_fp16rl.tools.plan.memory import RankMemory, in_flight
from tests import models
from tests.conftest import ROOT, python, run_ranks
from tests.workers import planning

LARGE = ROOT / "recipes/dense/qwen3-8b-dapo-fp16-2n8g.yaml"
FULL = {
    "megatron": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
PP2, EP2, DISTRIBUTED = (
    {"pipeline_parallel": 2},
    {"expert_parallel": 2},
    {"distributed_optimizer": True},
)
LORA = {"rank": 4, "alpha": 8}
CASES = {
    "dense": [
        {"ranks": 1},
        {"ranks": 2, **DISTRIBUTED},
        {"ranks": 2, **TP2},
        {"ranks": 2, **PP2},
        {"ranks": 2, **PP2, **FULL},
        {"ranks": 2, **PP2, "model_chunks": 2},
        {"ranks": 1, "lora": LORA},
    ],
    "experts": [
        {"ranks": 1},
        {"ranks": 2, **EP2, **FULL},
        {"ranks": 4, **EP2, **TP2, **DISTRIBUTED},
    ],
    "latent": [{"ranks": 2, **EP2, **DISTRIBUTED}],
}
SHAPES = {
    "dense": models.QWEN3,
    "experts": models.QWEN3_MOE,
    "latent": {**models.DEEPSEEK_V3, "kv_lora_rank": 64, "v_head_dim": 32, "qk_nope_head_dim": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("planned")
    for name, shape in SHAPES.items():
        shape = {**shape, **planning.SHAPE, "num_hidden_layers": 4}
        models.hf_model({**shape, "tie_word_embeddings": False}, root / name)
    return root


def test_planned_bytes_are_those_of_a_real_learner(folders):
    """What is always there within 3 %, what an update takes beside it within 15 %."""
    for name, layouts in CASES.items():
        cases = []
        for layout in layouts:
            learner = dict(layout)
            cases.append({"dtype": "fp16", "lora": learner.pop("lora", None), "learner": learner})
        folder = str(folders / name)
        plans = run_ranks(1, "planning.planned", folder=folder, cases=cases)[0]
        for case, plan in zip(cases, plans, strict=True):
            layout = Layout(
                **{k: v for k, v in case["learner"].items() if k in Layout.model_fields}
            )
            real = run_ranks(layout.ranks, "planning.measured", folder=folder, **case)
            for stage, planned in enumerate(plan):
                found = real[stage * layout.ranks // layout.pipeline_parallel]
                for what, tolerance in (("static", 0.03), ("training", 0.15)):
                    assert planned[what] == pytest.approx(found[what], rel=tolerance), (case, what)


@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        ("meta-device", "incompatible tensor type"),
        ("meta-groups", "ProcessGroupGloo"),
        ("meta-experts", "can't convert meta device type tensor to numpy"),
    ],
)
def test_nothing_is_planned_without_a_patch(folders, patch, complaint):
    case = {"dtype": "fp16", "learner": {"ranks": 2, **EP2, **DISTRIBUTED}}
    arguments = {"folder": str(folders / "experts"), "cases": [case], "without": patch}
    with pytest.raises(AssertionError, match=complaint):
        run_ranks(1, "planning.planned", **arguments)


def test_every_family_is_exported_whole_and_once():
    """At layouts of many ranks; one that leaves a tensor out, or has it twice, is found out."""
    counts, faults = run_ranks(1, "planning.proofs")[0]
    assert set(counts) == {*models.FAMILIES, *models.MOE_FAMILIES}
    assert all(count >= 20 for count in counts.values())
    assert faults["left out"] == ["model.norm.weight is not exported"]
    assert faults["twice"] == ["model.norm.weight is exported 2 times"]
    assert faults["reshaped"] == ["model.norm.weight is exported as (3,), but is (64,)"]
    assert faults["unknown"] == ["x is unknown to transformers"]


def test_plans_count_the_padding():
    of = planning.recipe("fp16", {"ranks": 1})
    sizes = {}
    for multiple in (1, 48):
        learner = of.learner.model_copy(update={"pad_to_multiple_of": multiple})
        found = micro_batch(of.model_copy(update={"learner": learner}))
        sizes[multiple] = (found.rows, found.seq)
    assert sizes == {1: (2, 64), 48: (1, 96)}  # of 128 tokens at most


def test_a_batch_is_there_at_the_peak_of_an_update():
    nothing = dict.fromkeys((field.name for field in fields(RankMemory)), 0)
    assert RankMemory(**nothing | {"batch": 7, "activations": 2, "sync": 8}).peak == 9


def test_activations_in_flight_are_those_of_megatrons_schedules():
    """As counted by hand in Narayanan et al. 2021 (arXiv 2104.04473), figures 3 and 4."""
    assert [len(in_flight(4, 1, stage, 8)) for stage in range(4)] == [4, 3, 2, 1]
    assert [len(in_flight(4, 1, stage, 2)) for stage in range(4)] == [2, 2, 2, 1]
    assert in_flight(4, 2, 3, 8) == [0, 0, 0, 0, 1]
    assert in_flight(4, 2, 0, 8) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


def plan(*arguments, code):
    done = python("-m", "megatron_fp16rl.cli", "plan", *arguments, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_command_says_what_fits_and_what_would():
    done = plan(LARGE.stem, "--json", "--nodes", "4", "--gpu", "h200", code=0)
    assert done.stderr.strip() == ""
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["gpu"] == "h200"
    assert found["margin_gib"] == pytest.approx(found["usable_gib"] - found["peak_gib"], abs=0.01)
    assert found["ranks"][0]["ranks"] == [0, 15]  # half of four nodes
    assert found["ranks"][0]["optimizer_whole_gib"] > found["ranks"][0]["optimizer_gib"]
    parts = (found[f"{part}_s"] for part in ("rollout", "score", "update", "sync"))
    assert found["step_s"] == pytest.approx(sum(parts))
    # 512 sequences of 2,048 + 8,192 tokens on 8 replicas; 21 bytes a token, three times
    wanted = 3 * 512 / 8 * 10_240 * 21 / 2**30
    assert found["ranks"][0]["batch_gib"] == pytest.approx(wanted, abs=1e-3)
    # 8.19 billion parameters in fp16 on two tensor-parallel ranks
    assert found["ranks"][0]["params_gib"] == pytest.approx(8.19e9 * 2 / 2 / 2**30, rel=0.01)

    no_recomputation = (
        "{recompute_granularity: null, recompute_method: null, recompute_num_layers: null}"
    )
    shown = plan(LARGE, "--set", f"learner.megatron={no_recomputation}", code=1).stdout
    assert "399 tensors exported, each once, as transformers has them" in shown
    assert "does not fit" in shown
    assert "most of it is activations" in shown
    assert "--set learner.megatron.recompute_granularity=full" in shown


def test_what_cannot_be_is_refused_with_the_reason():
    cases = {
        "learner.tensor_parallel=16": "is not a multiple of",
        "learner.first_stage_layers=2": "first_stage_layers=2 needs pipeline_parallel > 1",
        "model.shape=null": "there is no Hugging Face folder",
        "rollout.tensor_parallel=3": "num_attention_heads=32 is not a multiple of it",
        "rollout.max_new_tokens=40000": "but the model has 32768 positions",
        "learner.megatron.recompute_method=none": "Megatron-core refuses the recipe: .*recompute",
    }
    found = run_ranks(1, "planning.refusals", path=str(LARGE), settings=list(cases))[0]
    for said, complaint in zip(found, cases.values(), strict=True):
        assert re.search(complaint, said, re.S), said
