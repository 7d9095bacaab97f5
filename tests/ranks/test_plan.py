"""Plans against the engines: a real learner's bytes, transformers' tensors, SGLang's own models."""

import json
import re
import subprocess
import sys

import pytest
from transformers import AutoConfig

from megatron_fp16rl.models.costs import costs
from megatron_fp16rl.tools.plan.servers import rank_weights
from tests import models
from tests.conftest import ROOT, python, run_ranks
from tests.workers import planning

LARGE = ROOT / "recipes/dense/qwen3-8b-dapo-fp16-2n8g.yaml"
VOCABULARY = 4000
LAYERS = 4  # in place of 36, each of which takes time to build
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
PP2, EP2 = {"pipeline_parallel": 2}, {"expert_parallel": 2}
STREAM = {"megatron": {"fp32_residual_connection": True}}
OVERLAP = {
    "distributed_optimizer": True,
    "ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000},
}
CASES = [  # one rank without options: the selftest's row memory
    ("dense", {"ranks": 2, **TP2}),
    ("dense", {"ranks": 2, **PP2, "model_chunks": 2, **STREAM}),
    ("dense", {"ranks": 1, "lora": {"rank": 4, "alpha": 8}}),
    ("experts", {"ranks": 2, **EP2, "megatron": models.RECOMPUTED}),
    ("experts", {"ranks": 2, **EP2, **OVERLAP, **STREAM}),
    ("latent", {"ranks": 2, **EP2, "distributed_optimizer": True}),
]
SHAPES = {
    "dense": models.QWEN3,
    "experts": {**models.QWEN3_MOE, "num_experts_per_tok": 4},
    "latent": {**models.DEEPSEEK_V3, "kv_lora_rank": 64, "v_head_dim": 32, "qk_nope_head_dim": 32},
}


@pytest.fixture(scope="module")
def shape_file(tmp_path_factory):
    """The shape of Qwen3-8B with few layers."""
    shape = json.loads((ROOT / "recipes/models/qwen3-8b-base.json").read_text())
    file = tmp_path_factory.mktemp("shape") / "short.json"
    file.write_text(json.dumps({**shape, "num_hidden_layers": LAYERS}))
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("planned")
    for name, shape in SHAPES.items():
        shape = {**shape, **planning.SHAPE, "num_hidden_layers": 4}
        models.hf_model({**shape, "tie_word_embeddings": False}, root / name)
    return root


def test_planned_bytes_are_those_of_a_real_learner(folders):
    """What is always there within 3 %, what an update takes beside it within 15 %."""
    cases = [(str(folders / name), {"learner": learner}) for name, learner in CASES]
    (plans,) = run_ranks(1, "planning.planned", cases=cases)
    for (folder, case), plan in zip(cases, plans, strict=True):
        ranks = case["learner"]["ranks"]
        real = run_ranks(ranks, "planning.measured", folder=folder, **case)
        for stage, planned in enumerate(plan):
            measured = real[stage * ranks // len(plan)]
            for what, tolerance in (("static", 0.03), ("training", 0.15)):
                right = pytest.approx(measured[what], rel=tolerance)
                assert planned[what] == right, (folder, case, what)


def test_records_of_experts_in_flight_are_those_of_a_real_learner(folders):
    """Router replay keeps the records of every micro-batch in flight on the device."""
    folder = str(folders / "experts")
    cases = [{"learner": {"ranks": 2, **PP2}, "router_replay": on} for on in (False, True)]
    plain, replayed = run_ranks(1, "planning.planned", cases=[(folder, c) for c in cases])[0]
    real = [run_ranks(2, "planning.measured", folder=folder, **case)[0] for case in cases]
    planned = replayed[0]["training"] - plain[0]["training"]
    measured = real[1]["training"] - real[0]["training"]
    # 2 micro-batches in flight of 2 x 64 tokens, 2 layers of the first stage, 4 experts, a byte each.
    records = 2 * 128 * 2 * 4
    assert planned >= records
    assert measured == pytest.approx(planned, abs=64)


@pytest.mark.parametrize("head", [None, "fp32"])
def test_logits_are_those_of_a_real_learner(tmp_path, head):
    """Of a vocabulary so large that they are most of what an update takes."""
    shape = {**models.QWEN3, **planning.SHAPE, "num_hidden_layers": 1, "tie_word_embeddings": False}
    models.hf_model(shape, tmp_path, vocabulary=VOCABULARY)
    case = {"learner": {"ranks": 2, **TP2}, "head": head}
    ((plan,),) = run_ranks(1, "planning.planned", cases=[(str(tmp_path), case)])[0]
    real = run_ranks(2, "planning.measured", folder=str(tmp_path), **case)[0]
    logits = 2 * planning.SEQ * VOCABULARY // 2 * (4 if head else 2)
    assert plan["activations"] > logits  # kept for the backward pass
    for what, tolerance in (("static", 0.03), ("training", 0.1)):
        assert plan[what] == pytest.approx(real[what], rel=tolerance), what


@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        ("meta-device", "incompatible tensor type"),
        ("meta-groups", "ProcessGroupGloo"),
        ("meta-experts", "can't convert meta device type tensor to numpy"),
        ("meta-gather", "allgather_into_tensor_coalesced_"),
    ],
)
def test_no_plan_is_possible_without_a_patch(folders, patch, complaint):
    case = {"learner": {"ranks": 2, **EP2, **OVERLAP}}
    cases = [(str(folders / "experts"), case)]
    with pytest.raises(AssertionError, match=complaint):
        run_ranks(1, "planning.planned", cases=cases, without=patch)


def test_every_family_exports_each_tensor_once():
    counts, faults = run_ranks(1, "planning.exports")[0]
    assert set(counts) == {*models.FAMILIES, *models.MOE_FAMILIES}
    assert all(count >= 20 for count in counts.values())
    assert faults == {
        "left out": ["model.norm.weight is not exported"],
        "twice": ["model.norm.weight is exported 2 times"],
        "reshaped": ["model.norm.weight is exported as (3,), but is (64,)"],
        "unknown": ["x is unknown to transformers"],
    }


def test_the_command_prints_what_fits_and_what_would(shape_file):
    short = ["--set", f"model.shape={shape_file}"]
    done = python("-m", "megatron_fp16rl.cli", "plan", LARGE.stem, *short, "--json", "--gpu=h200")
    assert done.stderr.strip() == ""
    report = json.loads(done.stdout)
    assert report["fits"]
    assert report["gpu"] == "h200"
    margin = report["usable_gib"] - report["peak_gib"]
    assert report["margin_gib"] == pytest.approx(margin, abs=0.01)
    rank = report["ranks"][0]
    assert rank["ranks"] == [0, 7]  # half of two nodes
    parts = (report[f"{part}_s"] for part in ("rollout", "score", "update", "sync"))
    assert report["step_s"] == pytest.approx(sum(parts))
    # 512 sequences of 2,048 + 8,192 tokens on 4 replicas; 21 bytes a token, three times
    assert rank["batch_gib"] == pytest.approx(3 * 512 / 4 * 10_240 * 21 / 2**30, abs=1e-3)
    # Vocabulary twice, and attention and MLP of each layer, in fp16 on two tensor-parallel ranks.
    parameters = 4096 * (2 * 151936 + LAYERS * (2 * 4096 + 2 * 1024 + 3 * 12288))
    assert rank["params_gib"] == pytest.approx(parameters * 2 / 2 / 2**30, rel=0.01)

    nothing_again = dict.fromkeys(models.RECOMPUTED)
    settings = {"megatron": json.dumps(nothing_again), "micro_batch_tokens": 96 << 10}
    large = [f"--set=learner.{name}={value}" for name, value in settings.items()]
    ((code, shown),) = run_ranks(1, "planning.command", arguments=[str(LARGE), *short, *large])
    assert code == 1, shown
    assert f"{11 * LAYERS + 3} tensors exported, each once, as transformers has them" in shown
    assert "does not fit" in shown
    assert "most of it is activations" in shown
    assert "--set learner.megatron.recompute_granularity=full" in shown


def test_recipes_that_cannot_run_are_refused_with_the_reason(shape_file):
    cases = {
        "learner.tensor_parallel=16": "is not a multiple of",
        "learner.first_stage_layers=2": "first_stage_layers=2 needs pipeline_parallel > 1",
        "model.shape=null": "there is no Hugging Face folder",
        "rollout.tensor_parallel=3": "num_attention_heads=32 is not a multiple of it",
        "rollout.max_new_tokens=40000": "but the model has 32768 positions",
        "learner.megatron.recompute_method=none": "Megatron-core refuses the recipe: .*recompute",
    }
    settings = [f"model.shape={shape_file}", "slurm.rollout_nodes=4"]
    arguments = {"path": str(LARGE), "changes": list(cases), "settings": settings}
    reasons = run_ranks(1, "planning.refusals", **arguments)[0]
    for reason, complaint in zip(reasons, cases.values(), strict=True):
        assert re.search(complaint, reason, re.S), reason


SERVERS = [  # more ranks than kv heads, experts sliced and spread
    ("qwen2", 4, 1),
    ("qwen3-tied", 2, 1),
    ("llama", 4, 1),
    ("qwen3-moe", 4, 4),
    ("glm4-moe", 4, 2),
    ("deepseek-v3", 2, 1),
    ("deepseek-v3", 4, 4),
    ("glm4-moe-lite", 2, 2),
    ("gpt-oss", 2, 2),
    ("qwen3-next", 2, 1),
]


def shape(name: str) -> dict:
    """A vocabulary of the 64 rows that SGLang pads to, and so large that no norm or bias counts."""
    shape = {**models.FAMILIES, **models.MOE_FAMILIES}[name]
    return {**shape, "vocab_size": 12800, "tie_word_embeddings": name.endswith("-tied")}


def test_servers_hold_what_sglangs_own_models_do():
    """Within 2 %: what SGLang keeps in fp32, norms and biases are not counted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang_shapes"],
        input=json.dumps([[shape(name), parts, experts] for name, parts, experts in SERVERS]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr[-2000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    for (name, parts, experts), size in zip(SERVERS, sizes, strict=True):
        model = costs(AutoConfig.for_model(**shape(name)))
        numbers = rank_weights(model, parts, model.experts)
        numbers += 0 if model.tied else model.embedding / parts
        assert 2 * numbers == pytest.approx(size, rel=0.02), (name, parts, experts)
