"""The offline mismatch study with real engines: metrics, reuse, and the layer that is wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.recipe import BuildModel, Model, RecipeError, Sync
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.weight_sync.disk import DiskTransport
from megatron_fp16rl.tools.study import hidden
from megatron_fp16rl.tools.study.run import Study, make_prompts
from tests import models
from tests.conftest import run_ranks
from tests.runs import fp16rl

SEQUENCES = [[2, 3, 12, 4, 5, 13, 6, 7, 3, 1], [9, 9, 12, 3, 2, 13, 8, 2]]
LAYERS = models.QWEN3["num_hidden_layers"]


@pytest.fixture(scope="module")
def model():
    """Of weights so large that responses vary and rounding shows."""
    lively = {**models.QWEN3, "initializer_range": 0.1}
    return model_folder(Model(build=BuildModel(config=lively, alphabet=models.ALPHABET)))


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    file = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{a}+{a + 1}="}) + "\n" for a in range(5)))
    return file


@pytest.fixture(scope="module")
def study(model, problems, tmp_path_factory):
    """The command's options, what it printed, and the study's folder."""
    root = tmp_path_factory.mktemp("studies")
    options = [
        *("mismatch", str(model), "--dtypes", "bf16", "--prompts", str(problems)),
        *("--samples", "12", "--max-tokens", "24", "--template", "none", "--compared", "2"),
        *("--name", "tiny", "--root", str(root), "--json"),
    ]
    (printed,) = run_ranks(1, "servers.fp16rl", 500, arguments=options)
    return options, json.loads(printed), root / "tiny"


def scored(folder, dtype="bf16"):
    return [json.loads(line) for line in (folder / dtype / "scored.jsonl").read_text().splitlines()]


def test_metrics_are_those_of_the_log_probs_that_were_saved(study):
    _, result, folder = study
    (row,) = result["rows"]
    d = [np.subtract(r["pi_logprobs"], r["mu_logprobs"]) for r in scored(folder)]
    flat, sums = np.concatenate(d), np.array([x.sum() for x in d])
    lengths = [len(x) for x in d]
    assert (row["dtype"], row["sequences"], row["tokens"]) == ("bf16", 12, sum(lengths))
    assert len(set(lengths)) > 1
    expected = {
        "logprob_abs_mean": abs(flat).mean(),
        "logprob_abs_max": abs(flat).max(),
        "kl_k3": (np.expm1(flat) - flat).mean(),
        "kl_seq": -sums.mean(),
        "seq_log_ratio_std": sums.std(),
        "slope_per_1k_tokens": 1000 * np.polyfit(lengths, sums, 1)[0],
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-3), key
    rows = scored(folder)
    assert [row["prompt"] for row in rows] == [f"{i % 5}+{i % 5 + 1}=" for i in range(12)]
    assert len({tuple(row["response_ids"]) for row in rows[::5]}) > 1  # of one prompt, other seeds
    assert row["logprob_abs_mean"] > 1e-3  # of bf16: with fp16 it is a tenth
    assert result["bf16_over_fp16"] is None


def test_bf16_is_held_against_fp16_and_only_what_is_missing_is_measured(study, tmp_path):
    """As if fp16 had given a quarter of bf16's differences."""
    options, result, folder = study
    root = tmp_path / "studies"
    shutil.copytree(folder, root / "tiny")
    shutil.copytree(folder / "bf16", root / "tiny" / "fp16")
    fp16 = json.loads((folder / "bf16" / "result.json").read_text())
    fp16["row"] = {key: value / 4 for key, value in fp16["row"].items() if key != "dtype"}
    fp16["row"]["dtype"] = "fp16"
    (root / "tiny" / "fp16" / "result.json").write_text(json.dumps(fp16))
    again = [*options[:-1], "--dtypes", "fp16,bf16", "--root", root]
    both = json.loads(fp16rl(*again, "--json").stdout)
    assert both["bf16_over_fp16"] == pytest.approx(dict.fromkeys(both["bf16_over_fp16"], 4))
    assert both["rows"][1] == result["rows"][0]
    table = fp16rl(*again)
    assert "bf16 / fp16" in table.stdout
    assert "first layer with a jump" in table.stdout


def test_healthy_layers_have_no_jump(study):
    _, result, _ = study
    layers = result["layers"]["bf16"]
    assert layers["first_jump"] is None
    assert [row["point"] for row in layers["points"]] == hidden.points(LAYERS)
    last = next(row for row in layers["points"] if row["point"] == "final norm")
    for name in ("difference", "served_error", "learnt_error"):
        assert 0.4 * 2**-8 < last[name] < 5 * 2**-8


def test_results_and_figures_are_kept(study):
    _, result, folder = study
    for picture in ("mismatch.png", "layers.png"):
        assert (folder / picture).read_bytes()[1:4] == b"PNG"
    assert json.loads((folder / "result.json").read_text()) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--max-tokens", "23"), "holds a study with max_tokens = 24, not 23"),
        (("--max-tokens", "125"), "leaves 124 of the 128 positions"),
        (("--template", "chat"), "has no chat template; say --template none"),
        (("--dtypes", "fp16,fp8"), "there is no 'fp8'"),
        (("--prompts", "absent.jsonl"), "there is no file absent.jsonl"),
    ],
)
def test_what_cannot_be_is_said(study, change, message):
    options, _, _ = study
    refused = fp16rl(*options, *change, code=2)
    assert message in refused.stderr
    assert not refused.stdout


def test_a_chat_template_is_applied_and_problems_repeat(problems, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}={{ m.content }}{% endfor %}+"
    study = Study(model, ("fp16",), problems, samples=6, max_tokens=4)
    prompts = make_prompts(study, tokenizer, positions=64)
    assert [p.text for p in prompts] == ["=0+1=+", "=1+2=+", "=2+3=+", "=3+4=+", "=4+5=+", "=0+1=+"]
    assert prompts[0].ids == tokenizer.encode("=0+1=+")
    bad = problems.with_name("bad.jsonl")
    bad.write_text('{"problem": "1"}\n{"question": "2"}\n')
    with pytest.raises(RecipeError, match=r"bad.jsonl:2: there is no 'problem'"):
        make_prompts(Study(model, ("fp16",), bad, 6, 4), tokenizer, 64)


@pytest.fixture(scope="module")
def compared(server, tmp_path_factory):
    """What is found of a server with the learner's weights, and with one tensor of them wrong."""
    folder = model_folder(models.recipe().model)
    original = HFFolder(folder)
    weights = {name: original.read(name) for name in original.names()}
    client, states = Client(server.endpoint, 60), tmp_path_factory.mktemp("hidden")
    disk = DiskTransport(Sync(), folder, states / "scratch", "fp16")
    wrong = {
        "healthy": "",
        "layer 0": "model.layers.0.self_attn.o_proj.weight",
        "layer 1": "model.layers.1.mlp.up_proj.weight",
        "final norm": "model.norm.weight",
    }
    served = {}
    try:
        for case, name in wrong.items():
            disk.send(
                iter({n: w * 1.5 if n == name else w for n, w in weights.items()}.items()),
                "1",
                [client],
            )
            served[case] = [str(states / f"{case}-{i}") for i in range(len(SEQUENCES))]
            for ids, file in zip(SEQUENCES, served[case], strict=True):
                watched = server.log.parent / "hidden"
                save_file(hidden.served_states(client, watched, ids, LAYERS), file)
                assert not watched.exists()
    finally:
        disk.send(iter(weights.items()), "default", [client])
    (layers,) = run_ranks(
        1, "forensics.compare_layers", folder=str(folder), served=served, sequences=SEQUENCES
    )
    return folder, served, layers


def test_hidden_states_are_what_they_are_called(compared):
    """Both engines' against Hugging Face in fp32."""
    from transformers import AutoModelForCausalLM

    folder, served, layers = compared
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        out = reference(torch.tensor(SEQUENCES[:1]), output_hidden_states=True)
    embedding, first_layer, normed = (state[0] for state in out.hidden_states)
    expected = {
        "embedding": embedding,
        "layer 0": first_layer,
        "final norm": normed,
        "logits": out.logits[0, -1],
    }
    for file, tolerance in ((layers["file"], 1e-5), (served["healthy"][0], 3e-3)):
        states = load_file(file)
        assert set(states) == set(hidden.points(LAYERS))
        for point, values in expected.items():
            error = (states[point].float() - values).norm() / values.norm()
            assert error < tolerance, (file, point)


def test_the_wrong_layer_is_named(compared):
    _, _, layers = compared
    assert layers["healthy"]["first_jump"] is None
    assert layers["healthy"]["tokens"] == 18
    for case in ("layer 0", "layer 1", "final norm"):
        assert layers[case]["first_jump"] == case
        rows = {row["point"]: row for row in layers[case]["points"]}
        # SGLang's error, not Megatron's, whose weights are right.
        assert rows[case]["served_error"] > 10 * rows[case]["learnt_error"]


def test_differences_are_means_over_tokens_without_those_that_are_zero():
    """Two tokens of length 5 and 10, a third of length 0 in the embedding; SGLang is off by 1."""
    from megatron_fp16rl.tools.study.layers import compare

    reference = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]])
    states = dict.fromkeys(hidden.points(1), reference)
    states["logits"] = reference[1]
    served = {point: value + torch.tensor([1.0, 0.0]) for point, value in states.items()}
    compared = compare([(served, states, states)], "fp16")
    rows = {row["point"]: row for row in compared["points"]}
    assert rows["embedding"]["difference"] == pytest.approx((1 / 5 + 1 / 10) / 2)
    assert rows["embedding"]["grown"] == pytest.approx(0.15 / 2**-11)
    assert rows["layer 0"]["grown"] == pytest.approx(1)
    assert rows["logits"]["served_error"] == pytest.approx(1 / 10)
    assert rows["logits"]["learnt_error"] == 0
