"""Every layout of the learner computes what Hugging Face computes, in fp32."""

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_fp16rl.models.folder import HFFolder
from tests import models
from tests.conftest import run_ranks

TP2, SP = {"tensor_parallel": 2}, {"sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
EP2 = {"expert_parallel": 2}
CP2, ROWS = {"context_parallel": 2}, {"packing": False}
# Each for a path of its own; what two of them do together is the same code.
DENSE = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, {**TP2, **SP}),
    "dp2": (2, {}),
    "pp2": (2, PP2),
    "pp2-uneven-interleaved": (2, {**PP2, "model_chunks": 2, "last_stage_layers": 2}),
    # A stage that is neither the first nor the last.
    "pp3-uneven": (3, {"pipeline_parallel": 3, "first_stage_layers": 1, "last_stage_layers": 3}),
    "tp2-pp2-sp": (4, {**TP2, **SP, **PP2}),
    "cp2": (2, CP2),
    "cp2-dp2-distributed-optimizer": (4, {**CP2, "distributed_optimizer": True}),
    "cp2-tp2-sp": (4, {**CP2, **TP2, **SP}),
    "cp2-pp2-interleaved": (4, {**CP2, **PP2, "model_chunks": 2}),
    "cp4": (4, {"context_parallel": 4}),
    "rows": (1, ROWS),
    "rows-pp2-interleaved": (2, {**ROWS, **PP2, "model_chunks": 2}),
    "rows-cp2": (2, {**ROWS, **CP2}),
}
MOE = {
    "one": (1, {}),
    "ep2": (2, EP2),
    "tp2-sp": (2, {**TP2, **SP}),
    "pp2": (2, PP2),
    "pp2-uneven": (2, {**PP2, "first_stage_layers": 1}),
    "ep2-tp2": (2, {**EP2, **TP2, **SP}),
    "ep2-tp2-etp2": (4, {**EP2, **TP2, **SP, "expert_tensor_parallel": 2}),
    "cp2-ep2-dp2": (4, {**CP2, **EP2}),
    "rows-cp2-ep2": (2, {**ROWS, **CP2, **EP2}),
}
WITH_BIASES = {"gpt-oss"}  # in experts, which Megatron does not cut then
DEEP = {"model_chunks", "first_stage_layers", "last_stage_layers"}
DEEP_LAYERS = 8
GATE = 1e-5


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Every family as a Hugging Face folder, and what Hugging Face computes with it."""
    return make_references(tmp_path_factory.mktemp("families"))


def make_references(root):
    deep = {
        "deep-dense": {**models.QWEN3, "num_hidden_layers": DEEP_LAYERS},
        # An uneven first stage of one layer: the second begins with a dense layer, then has experts.
        "deep-experts": {
            **models.DEEPSEEK_V3,
            "num_hidden_layers": DEEP_LAYERS,
            "first_k_dense_replace": 2,
        },
    }
    configs = {**models.FAMILIES, **models.MOE_FAMILIES, **deep}
    hf = {name: models.hf_model(config, root / name) for name, config in configs.items()}
    return {name: (root / name, hugging_face(model)) for name, model in hf.items()}


CASES = [("dense", name) for name in DENSE] + [("experts", name) for name in MOE]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_layouts(references, kind, name):
    for family, apart in differences(references, kind, name).items():
        for what, difference in apart.items():
            assert difference <= GATE, (family, what, difference)


def test_kimi_k2_is_computed_as_hugging_face_computes_deepseek_v3(tmp_path):
    hf = models.hf_model(models.KIMI_K2, tmp_path)
    models.edit_json(tmp_path / "config.json", model_type="kimi_k2")
    assert furthest(tmp_path, hf) <= GATE


def test_norms_of_latents_have_the_models_eps_as_servers_give_them(tmp_path):
    """Not transformers' 1e-6. The published 1e-5 differs from it by 10 % where latents are as small as here."""
    hf = models.hf_model({**models.GLM4_MOE_LITE, "rms_norm_eps": 1e-3}, tmp_path)
    assert furthest(tmp_path, hf) <= GATE
    for module in hf.modules():
        if hasattr(module, "q_a_layernorm"):
            module.q_a_layernorm.variance_epsilon = module.kv_a_layernorm.variance_epsilon = 1e-6
    assert furthest(tmp_path, hf) > 100 * GATE


def test_mxfp4_weights_are_learnt_as_transformers_reads_them(tmp_path):
    hf = models.hf_model(models.GPT_OSS, tmp_path)
    models.in_mxfp4(tmp_path, (119, 123))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")]:
        packed = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
        tensors[name] = convert_moe_packed_tensors(*packed)
    assert furthest(tmp_path, hf) > 1000 * GATE
    hf.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert furthest(tmp_path, hf) <= GATE


def furthest(folder, hf):
    """The largest difference of a learner's log-probs from a transformers model's, in nats."""
    (result,) = run_ranks(1, "parity.parity", folders=[str(folder)], layout={})
    ours = torch.load(result[str(folder)]["file"])["logprobs"]
    _, expected, _, _ = hugging_face(hf)
    rows = zip(ours, expected, strict=True)
    return max((row[1 : 1 + len(theirs)] - theirs).abs().max().item() for row, theirs in rows)


def differences(references, kind, name):
    """By family: the largest differences from Hugging Face, over all ranks.

    Of loss, logits and log-probs in nats; of the gradient norm relative to it; of gradients
    relative to 0.1 more than the largest of the same parameter. Exported weights must be equal to the last bit.
    """
    ranks, layout = {"dense": DENSE, "experts": MOE}[kind][name]
    families = models.FAMILIES if kind == "dense" else models.MOE_FAMILIES
    names = [f"deep-{kind}"] if DEEP & set(layout) else list(families)
    if "expert_tensor_parallel" in layout:
        names = [name for name in names if name not in WITH_BIASES]
    references = {family: references[family] for family in names}
    folders = [str(folder) for folder, _ in references.values()]
    results = run_ranks(ranks, "parity.parity", folders=folders, layout=layout)
    found = {}
    for name, (folder, (logits, logprobs, loss, gradients)) in references.items():
        norm = sum(g.double().pow(2).sum() for g in gradients.values()).sqrt().item()
        apart = dict.fromkeys(("loss", "logits", "log-probs", "gradients", "gradient norm"), 0.0)

        def see(what, difference, apart=apart):
            apart[what] = max(apart[what], float(difference))

        for rank, result in enumerate(results):
            ours = torch.load(result[str(folder)]["file"])
            for row, ids in enumerate(models.random_tokens()):
                if ours["logits"] is not None:
                    see("logits", (ours["logits"][row, : len(ids)] - logits[row]).abs().max())
                ours_here = ours["logprobs"][row, 1 : len(ids)]
                see("log-probs", (ours_here - logprobs[row]).abs().max())
            see("loss", abs(result[str(folder)]["loss"] - loss))
            see("gradient norm", abs(result[str(folder)]["grad_norm"] / norm - 1))
            assert rank == 0 or not ours["exported"], "rank 0 exports"
        ours = torch.load(results[0][str(folder)]["file"])
        on_disk = HFFolder(folder)
        assert sorted(ours["exported"]) == on_disk.names()
        for tensor_name, tensor in ours["exported"].items():
            assert torch.equal(tensor, on_disk.read(tensor_name)), (name, tensor_name)
        if not layout.get("distributed_optimizer"):
            biases = [n for n in ours["exported"] if n.endswith("e_score_correction_bias")]
            assert sorted([*ours["gradients"], *biases]) == sorted(ours["exported"])
        for tensor_name, gradient in ours["gradients"].items():
            if tensor_name in gradients:  # transformers keeps the experts in one tensor
                size = gradients[tensor_name].abs().max() + 0.1
                see("gradients", (gradient - gradients[tensor_name]).abs().max() / size)
        found[name] = apart
    return found


def hugging_face(model):
    """Logits, log-probs, mean loss over all tokens, and its gradient."""
    sequences = models.random_tokens()
    model.zero_grad()
    logits = [model(torch.tensor([ids])).logits[0] for ids in sequences]
    logprobs = [
        lg[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        for lg, ids in zip(logits, sequences, strict=True)
    ]
    loss = -torch.cat(logprobs).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    detached = [[t.detach() for t in tensors] for tensors in (logits, logprobs)]
    return *detached, loss.item(), gradients


def table():
    """docs/parity.md: `python -m tests.ranks.test_layouts > docs/parity.md`."""
    print(
        "# Parity with Hugging Face at every layout\n\n"
        "Tiny random models in fp32 on gloo ranks, the worst of all families; `tests/ranks/test_layouts.py`\n"
        f"fails above {GATE:g}, of loss and logits too. Made by `python -m tests.ranks.test_layouts`. Log-probs in\n"
        "nats; gradients relative to the largest of their parameter (plus 0.1), the norm to itself. Weights are\n"
        "exported bit for bit."
    )
    with tempfile.TemporaryDirectory() as folder:
        references = make_references(Path(folder))
        previous = None
        for kind, name in CASES:
            found = differences(references, kind, name)
            columns = ["log-probs", "gradients", "gradient norm"]
            if kind != previous:
                families = ", ".join(found)
                print(
                    f"\n## {kind.capitalize()} ({families})\n\n| layout | {' | '.join(columns)} |"
                )
                print("|---" * (1 + len(columns)) + "|")
                previous = kind
            worst = [max(apart[column] for apart in found.values()) for column in columns]
            cells = [f"{value:.1e}" if value else "-" for value in worst]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    table()
