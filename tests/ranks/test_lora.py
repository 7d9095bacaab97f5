"""Adapters on every layout against Hugging Face with W + alpha / rank * B A computed by hand, in fp32."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_fp16rl.data.batch import Prompt, Sample
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.rollout import recording
from tests import models
from tests.conftest import assert_replicas_agree, run_ranks
from tests.ranks.test_loss_scale import check_skipped

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# Rank 3 of no divisor; a subset of what Megatron fuses (up without gate, q and v without k).
SETTINGS = {
    "qwen2": {"rank": 3, "alpha": 5.0, "targets": ALL},
    "qwen3-tied": {"rank": 1, "alpha": 2.0, "targets": ["v_proj", "q_proj", "up_proj"]},
    "deep": {"rank": 2, "alpha": 1.0, "targets": ["o_proj", "gate_proj"]},
    **{name: {"rank": 2, "alpha": 2.0, "targets": ATTENTION} for name in ("qwen3-moe", "gpt-oss")},
}
DENSE = ["qwen2", "qwen3-tied"]
TP2, SP = {"tensor_parallel": 2}, {"sequence_parallel": True}
CHUNKS = {"pipeline_parallel": 2, "model_chunks": 2}
CASES = {
    "one": (1, {}, {}, DENSE),
    "tp2-sp": (2, {**TP2, **SP}, {}, DENSE),
    # The first layer's input, an embedding's output, has no gradient of its own.
    "pp2-interleaved-recomputed": (2, CHUNKS, models.RECOMPUTED, ["deep"]),
    "cp2": (2, {"context_parallel": 2}, {}, DENSE),
    "dp2-distributed-optimizer": (2, {"distributed_optimizer": True}, {}, DENSE),
    "ep2-tp2-sp": (2, {**TP2, **SP, "expert_parallel": 2}, {}, ["qwen3-moe", "gpt-oss"]),
}
GATE = 1e-5
IN_FP16 = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """By family: folder, and what Hugging Face makes of the model with lively adapters."""
    root = tmp_path_factory.mktemp("lora")
    deep = {**models.QWEN3, "num_hidden_layers": 4}
    configs = {**models.FAMILIES, **models.MOE_FAMILIES, "deep": deep}
    return {
        family: (root / family, hugging_face(models.hf_model(configs[family], root / family), lora))
        for family, lora in SETTINGS.items()
    }


def hugging_face(model, lora):
    """Of a model and its adapters: merged weights, log-probs, loss, gradients, one step of Adam."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    adapters, merged = {}, dict(weights)
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2] in lora["targets"]:
            shapes = {"A": (lora["rank"], weight.shape[1]), "B": (weight.shape[0], lora["rank"])}
            for matrix, shape in shapes.items():
                key = f"{module}.lora_{matrix}.weight"
                adapters[key] = models.lively_adapter(key, shape).requires_grad_()
            a, b = (adapters[f"{module}.lora_{matrix}.weight"] for matrix in "AB")
            merged[name] = weight + lora["alpha"] / lora["rank"] * b @ a
    logprobs = []
    for ids in models.random_tokens():
        output = torch.func.functional_call(model, merged, (torch.tensor([ids]),))
        chosen = output.logits[0, :-1].log_softmax(-1)
        logprobs.append(chosen.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    loss = -torch.cat(logprobs).mean()
    loss.backward()
    gradients = {name: matrix.grad.clone() for name, matrix in adapters.items()}
    torch.optim.Adam(adapters.values(), lr=1e-3, betas=(0.9, 0.95)).step()
    return {
        "weights": weights,
        "merged": {n: w.detach() for n, w in merged.items()},
        "logprobs": [lp.detach() for lp in logprobs],
        "loss": loss.item(),
        "gradients": gradients,
        "learnt": {name: matrix.detach() for name, matrix in adapters.items()},
    }


@pytest.fixture(params=CASES)
def case(request, references):
    """Name of a layout; results of its ranks, by family."""
    ranks, layout, megatron, families = CASES[request.param]
    folders = {str(references[family][0]): SETTINGS[family] for family in families}
    results = run_ranks(ranks, "parity.lora", folders=folders, layout=layout, megatron=megatron)
    by_family = {f: [result[str(references[f][0])] for result in results] for f in families}
    return request.param, by_family


def test_adapters_equal_hugging_face(case, references):
    name, by_family = case
    for family, results in by_family.items():
        folder, expected = references[family]
        for result in results:
            ours = torch.load(result["file"])
            for row, logprobs in enumerate(expected["logprobs"]):
                found = ours["logprobs"][row, 1 : len(logprobs) + 1]
                assert (found - logprobs).abs().max() < GATE
            norm = sum(g.double().pow(2).sum() for g in expected["gradients"].values()).sqrt()
            assert result["loss"] == pytest.approx(expected["loss"], abs=GATE)
            assert result["grad_norm"] == pytest.approx(norm.item(), rel=GATE)
            assert result["frozen"]
        assert_replicas_agree([result["shards"] for result in results])
        ours = torch.load(results[0]["file"])
        check_start(ours["fresh"], expected["learnt"])
        if "distributed" not in name:
            assert sorted(ours["gradients"]) == sorted(expected["gradients"])
        for key, gradient in ours["gradients"].items():
            size = expected["gradients"][key].abs().max() + 0.1
            assert (gradient - expected["gradients"][key]).abs().max() / size < GATE, key
        for key, learnt in expected["learnt"].items():  # Adam takes the sign even of tiny gradients
            assert (ours["learnt"][key] - learnt).abs().mean() < 1e-6, key
        check_export(ours["exported"], folder, expected)
        check_adapter(folder / f"adapter-{len(results)}", SETTINGS[family], folder)


def check_start(fresh, like):
    assert {name: t.shape for name, t in fresh.items()} == {n: t.shape for n, t in like.items()}
    for name, matrix in fresh.items():
        if name.endswith("lora_B.weight"):
            assert not matrix.any()
        else:
            bound = matrix.shape[1] ** -0.5
            assert 0.9 * bound < matrix.abs().max() <= bound
            assert matrix.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert len({matrix.sum().item() for matrix in fresh.values()}) > len(fresh) / 2


def check_export(exported, folder, expected):
    """Merged weights, under the names of those on disk; those without an adapter to the last bit."""
    on_disk = HFFolder(folder)
    assert sorted(exported) == on_disk.names()
    changed = 0
    for name, tensor in exported.items():
        if name.removesuffix("weight") + "lora_A.weight" not in expected["gradients"]:
            assert torch.equal(tensor, on_disk.read(name)), name
        else:
            changed += 1
            np.testing.assert_allclose(tensor, expected["merged"][name], atol=1e-6, rtol=0)
            assert torch.equal(tensor, HFFolder(folder / "merged").read(name))
    assert changed == len(expected["gradients"]) / 2


def check_adapter(adapter, lora, base, least_change=0.05):
    """Names, numbers and arithmetic of PEFT's files."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bias"], config["lora_dropout"]) == ("LORA", "none", 0.0)
    assert config["base_model_name_or_path"] == str(base)
    assert sorted(config["target_modules"]) == sorted(lora["targets"])
    saved = load_file(adapter / "adapter_model.safetensors")
    modules = {name.rpartition(".lora_")[0] for name in saved}
    assert len(saved) == 2 * len(modules)
    before, after = HFFolder(base), HFFolder(base / "merged")
    for module in modules:
        a, b = (saved[f"{module}.lora_{matrix}.weight"] for matrix in "AB")
        name = module.removeprefix("base_model.model.") + ".weight"
        change = config["lora_alpha"] / config["r"] * b @ a
        np.testing.assert_allclose(after.read(name), before.read(name) + change, atol=1e-6)
        assert change.abs().max() > least_change


def test_run_leaves_adapters_that_belong_to_its_warm_start(tmp_path):
    """reference/ and adapter/ make export/, and reference/ is what all weights learnt before."""
    for step in range(2):
        rewards = [1.0, 0.0, 0.0, 1.0] * 4
        samples = [
            Sample(Prompt("", [2, 12], ""), i // 4, [i % 5 + 2, 1], [-2.0, -2.0], "", False, 0, r)
            for i, r in enumerate(rewards)
        ]
        recording.write_samples(tmp_path / "rollouts", step, 0, samples)
    heard, _ = run_ranks(2, "parity.lora_run", folder=str(tmp_path), lora={"rank": 2, "alpha": 4.0})
    warming = [f"update {i} of the warm start" for i in (1, 2)]
    assert [line for line in heard if line.startswith(("update", "step"))] == [
        *warming,
        "step 1",
        "step 2",
    ]
    (tmp_path / "export").rename(tmp_path / "reference" / "merged")
    lora = {"targets": ALL}
    check_adapter(tmp_path / "adapter", lora, tmp_path / "reference", least_change=1e-3)
    begun = HFFolder(model_folder(models.recipe().model))
    warm = HFFolder(tmp_path / "reference")
    name = "model.embed_tokens.weight"
    assert (warm.read(name) - begun.read(name)).abs().max() > 1e-4
    assert torch.equal(warm.read(name), HFFolder(tmp_path / "reference" / "merged").read(name))


def test_fp16_overflow_in_an_adapter_skips_the_update_on_all_ranks():
    arguments = {"kinds": ["adapter"], "family": "qwen3-tied", "lora": IN_FP16}
    results = run_ranks(2, "precision.overflow", layout=TP2, **arguments)
    for result in results:
        assert "3 updates in a row overflowed" in result.pop("stopped")
    for case in results[0]:
        assert_replicas_agree([result[case]["shards"] for result in results])
        for result in results:
            check_skipped(result[case], TP2)


def test_non_finite_values_are_traced_to_adapters():
    """A matrix that is not finite; a product of two that are, which is not."""
    name = "decoder.layers.1.mlp.linear_fc2_lora"
    large = {f"{name}.down_proj_{matrix}": 1e4 for matrix in "AB"}
    cases = {
        "poison": {"do": "update", "poison": [f"{name}.down_proj_A", 1]},
        "forward": {"do": "update", "multiply": large, "fill_adapters": True},
    }
    arguments = {"family": "qwen3-tied", "lora": IN_FP16, "cases": cases}
    for result in run_ranks(2, "forensics.faults", layout=TP2, **arguments):
        assert f"parameter {name}.down_proj_A is not finite (rank 1" in result["poison"]["said"]
        assert f"began in the forward pass, in {name} " in result["forward"]["said"]


def test_reference_keeps_only_adapters():
    for result in run_ranks(2, "precision.reference", layout={**TP2, **SP}, lora=IN_FP16):
        assert result.pop("moved") > 0.01
        assert all(result.values()), result


def test_resume_is_bit_exact_and_reads_other_layouts(tmp_path):
    """At the same layout to the last bit, at another with the same weights; not with other adapters."""
    family = {"family": "qwen3-tied", "before": 4, "after": 2, "lora": IN_FP16}
    arguments = {"folder": str(tmp_path / "run"), **family}
    layout = {**TP2, **SP}
    first = run_ranks(2, "resuming.resume", layout=layout, **arguments)
    again = run_ranks(2, "resuming.resume", layout=layout, **arguments)
    for whole, resumed in zip(first, again, strict=True):
        for what in ("log", "shards", "scaler", "at_checkpoint"):
            assert resumed[what] == whole[what], what
    sharded = {"distributed_optimizer": True}
    for result in run_ranks(
        2, "resuming.resume", layout=sharded, seed=1, **arguments
    ):  # other weights
        assert result["at_checkpoint"] == first[0]["at_checkpoint"]
        losses, expected = ([row[0] for row in r["log"]] for r in (result, first[0]))
        assert losses == pytest.approx(expected, rel=1e-4)
    assert np.abs(np.subtract(first[0]["weights"], first[0]["at_checkpoint"][0])).max() > 1e-4
    (other,) = run_ranks(
        1, "resuming.resume", layout={}, **{**arguments, "lora": {"rank": 2, "alpha": 8.0}}
    )
    assert "was made with learner.lora={'rank': 4" in other["refused"]
    converted = {"checkpoint": str(tmp_path / "run" / "step_4"), "folder": str(tmp_path / "hf")}
    run_ranks(1, "resuming.to_hugging_face", **converted)
    folder = HFFolder(tmp_path / "hf")
    tensors = [folder.read(name).float().flatten() for name in folder.names()]
    assert torch.cat(tensors).tolist() == first[0]["at_checkpoint"][0]


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("qwen3-moe", ALL, r"gate_proj, up_proj, down_proj of this model are in experts.*\[q_proj"),
        ("deepseek-v3", ATTENTION, "latent attention"),
        ("glm4-moe-lite", ATTENTION, "latent attention"),
    ],
)
def test_model_that_cannot_have_adapters_is_refused(family, targets, message, tmp_path):
    models.hf_model(models.MOE_FAMILIES[family], tmp_path)
    folders = {str(tmp_path): {"rank": 1, "alpha": 1.0, "targets": targets}}
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, "parity.lora", folders=folders, layout={}, megatron={})
