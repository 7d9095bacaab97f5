"""Every layout of the learner computes what Hugging Face computes, in fp32."""

import tempfile
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.recipe import Layout, RecipeError
from tests import models
from tests.conftest import run_ranks

TP2, SP = {"tensor_parallel": 2}, {"sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
EP2 = {"expert_parallel": 2}
DENSE = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, {**TP2, **SP}),
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, {"distributed_optimizer": True}),
    "pp2": (2, PP2),
    "pp2-interleaved": (2, {**PP2, "model_chunks": 2}),
    "pp2-uneven": (2, {**PP2, "first_stage_layers": 1}),
    "pp2-uneven-interleaved": (2, {**PP2, "model_chunks": 2, "last_stage_layers": 2}),
    "pp3-uneven": (3, {"pipeline_parallel": 3, "first_stage_layers": 1, "last_stage_layers": 3}),
    "tp2-pp2-sp": (4, {**TP2, **SP, **PP2}),
}
MOE = {
    "one": (1, {}),
    "ep2": (2, EP2),
    "tp2-sp": (2, {**TP2, **SP}),
    "pp2": (2, PP2),
    "pp2-uneven": (2, {**PP2, "first_stage_layers": 1}),
    "tp2-etp2": (2, {**TP2, **SP, "expert_tensor_parallel": 2}),
    "ep2-tp2": (4, {**EP2, **TP2, **SP}),
    "ep2-tp2-etp2": (4, {**EP2, **TP2, **SP, "expert_tensor_parallel": 2}),
}
DEEP = {"model_chunks", "first_stage_layers", "last_stage_layers"}
DEEP_LAYERS = 8
GATE = 1e-5


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Every family as a Hugging Face folder, and the model that Hugging Face makes of it."""
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
    return {name: (root / name, models.hf_model(c, root / name)) for name, c in configs.items()}


CASES = [("dense", name) for name in DENSE] + [("experts", name) for name in MOE]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_layouts(references, kind, name):
    for family, apart in differences(references, kind, name).items():
        for what, difference in apart.items():
            assert difference <= GATE, (family, what, difference)


@pytest.mark.parametrize(
    ("family", "layout", "message"),
    [
        ("qwen3", {"tensor_parallel": 4}, "tensor_parallel=4 .* num_key_value_heads=2; .* 1, 2"),
        ("qwen3", {"pipeline_parallel": 4}, "pipeline_parallel x model_chunks=4 .* num_hidden_lay"),
        (
            "qwen3",
            {"pipeline_parallel": 2, "first_stage_layers": 1, "last_stage_layers": 2},
            "last_stage_layers=2: .* leaves -1 for the 0 .*",
        ),
        ("qwen3", {"expert_parallel": 2}, "expert_parallel=2.*this qwen3 model has no experts"),
        ("qwen3-moe", {"expert_parallel": 3}, "expert_parallel=3 .* num_experts=8; .* 2, 4"),
        (
            "qwen3",
            {"pipeline_parallel": 3, "first_stage_layers": 1},
            "first_stage_layers=1: .*=2 that leaves 1 for the 2 pipeline ranks between$",
        ),
        ("qwen3-moe", {"tensor_parallel": 2}, "needs learner.sequence_parallel: true"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(family, layout, message):
    from transformers import AutoConfig

    options = {**models.FAMILIES, **models.MOE_FAMILIES}[family]
    config = AutoConfig.for_model(vocab_size=99, **options)
    with pytest.raises(RecipeError, match=message):
        describe(config, Layout(ranks=12, **layout))


UNEVEN = [  # layers of large models, pipeline ranks, chunks, first, last, stages of them or the remedy
    (94, 8, 1, 11, 11, None),
    (46, 4, 1, 11, 11, None),
    (61, 16, 1, 3, 2, None),
    (61, 8, 1, 7, 6, None),
    (94, 8, 2, 10, 12, None),
    (12, 2, 1, 5, 7, None),
    (61, 8, 1, 7, None, "leaves 54 for the 7 .*; first_stage_layers could be 5, 12, 19$"),
    (61, 8, 1, 7, 7, "leaves 47 for the 6 .*; first_stage_layers could be 6, 12, 18$"),
    (94, 8, 2, 12, 12, "leaves 70 for the 6 .*; first_stage_layers could be 10, 22, 34$"),
    (8, 4, 1, 8, None, "leaves 0 for the 3 .*; first_stage_layers could be 2, 5$"),
]


@pytest.mark.parametrize(("layers", "ranks", "chunks", "first", "last", "message"), UNEVEN)
def test_uneven_stages_are_those_of_megatron(layers, ranks, chunks, first, last, message):
    """What is let through is cut by Megatron into stages that hold every layer once; the rest is refused."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from transformers import AutoConfig

    config = AutoConfig.for_model(vocab_size=99, **{**models.QWEN3, "num_hidden_layers": layers})
    layout = Layout(
        ranks=ranks,
        pipeline_parallel=ranks,
        model_chunks=chunks,
        first_stage_layers=first,
        last_stage_layers=last,
    )
    if message:
        with pytest.raises(RecipeError, match=message):
            describe(config, layout)
        return
    describe(config, layout)
    megatron = TransformerConfig(
        num_layers=layers,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    held = []
    for chunk in range(chunks):
        for rank in range(ranks):
            vp_stage = chunk if chunks > 1 else None
            start = get_transformer_layer_offset(megatron, vp_stage, rank)
            held += range(start, start + get_num_layers_to_build(megatron, vp_stage, rank))
    assert held == list(range(layers))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"ranks": 6, "tensor_parallel": 4}, "ranks=6 is not a multiple of tensor_parallel=4"),
        (
            {"ranks": 6, "tensor_parallel": 2, "pipeline_parallel": 2},
            "tensor_parallel=2 x pipeline_parallel=2; nearest: 4, 8",
        ),
        ({"ranks": 2, "expert_parallel": 4}, "expert_parallel=4; nearest: 4"),
        ({"ranks": 2, "context_parallel": 2}, "only Transformer Engine's has it"),
        ({"ranks": 2, "model_chunks": 2}, "needs pipeline_parallel > 1"),
        ({"ranks": 2, "last_stage_layers": 2}, "last_stage_layers=2 needs pipeline_parallel > 1"),
        (
            {"ranks": 2, **PP2, "model_chunks": 2, "first_stage_layers": 3},
            "first_stage_layers=3 is not a multiple of model_chunks=2; nearest: 2, 4",
        ),
        (
            {
                "ranks": 2,
                **PP2,
                "model_chunks": 2,
                "first_stage_layers": 2,
                "last_stage_layers": 2,
            },
            "set last_stage_layers to null",
        ),
        ({"ranks": 2, "sequence_parallel": True}, "needs tensor_parallel > 1"),
    ],
)
def test_layouts_that_do_not_divide_the_ranks_are_refused(layout, message):
    with pytest.raises(ValidationError, match=message):
        Layout(**layout)


def differences(references, kind, name):
    """By family: the largest differences from Hugging Face, over all ranks.

    Of loss, logits and log-probs in nats; of the gradient norm relative to it; of gradients
    relative to 0.1 more than the largest of the same parameter. Exported weights must be equal to the last bit.
    """
    ranks, layout = {"dense": DENSE, "experts": MOE}[kind][name]
    families = models.FAMILIES if kind == "dense" else models.MOE_FAMILIES
    names = [f"deep-{kind}"] if DEEP & set(layout) else families
    references = {family: references[family] for family in names}
    folders = [str(folder) for folder, _ in references.values()]
    results = run_ranks(ranks, "parity.parity", folders=folders, layout=layout)
    sequences = models.random_tokens()
    found = {}
    for name, (folder, hf) in references.items():
        logits, logprobs, loss, gradients = hugging_face(hf, sequences)
        norm = sum(g.double().pow(2).sum() for g in gradients.values()).sqrt().item()
        apart = dict.fromkeys(("loss", "logits", "log-probs", "gradients", "gradient norm"), 0.0)

        def see(what, difference, apart=apart):
            apart[what] = max(apart[what], float(difference))

        for rank, result in enumerate(results):
            ours = torch.load(result[str(folder)]["file"])
            for row, ids in enumerate(sequences):
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


def hugging_face(model, sequences):
    """Logits, log-probs, mean loss over all tokens, and its gradient."""
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
        f"fails above {GATE:g}. Made by `python -m tests.ranks.test_layouts`. Loss, logits and log-probs in nats;\n"
        "gradients relative to the largest of their parameter (plus 0.1), the norm relative to itself.\n"
        "Logits are compared where one stage has them all. Weights are exported bit for bit.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        references = make_references(Path(folder))
        previous = None
        for kind, name in CASES:
            found = differences(references, kind, name)
            columns = list(next(iter(found.values())))
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
