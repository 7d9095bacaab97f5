"""Router replay: expert choices from Hugging Face, and at random."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import linear

from tests import models
from tests.conftest import run_ranks
from tests.ranks.test_layouts import hugging_face

TOKENS = models.random_tokens()
CHUNKS = {"pipeline_parallel": 2, "model_chunks": 2}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
LAYOUTS = {
    "one": (1, {}, {}, models.MOE_FAMILIES),
    "ep2": (2, {"expert_parallel": 2}, {}, ["qwen3-moe"]),
    "cp2-tp2-sp-recompute": (4, {"context_parallel": 2, **TP2}, models.RECOMPUTED, ["qwen3-moe"]),
    # Several micro-batches in flight, each recomputed with its own records.
    "pp2-interleaved-recompute": (2, CHUNKS, models.RECOMPUTED, ["deep"]),
}


@contextmanager
def routers(model, sequences, experts=None):
    """Hugging Face's routers, made to take `experts` [batch, seq, layers, top_k] (-1: their own).

    The sequences are to be run one by one. Yields what the routers take on their own.
    """
    config, row = model.config, -1
    longest, top_k = max(map(len, sequences)), config.num_experts_per_tok
    shape = (len(sequences), longest, config.num_hidden_layers, top_k)
    own = torch.full(shape, -1, dtype=torch.int32)

    def next_row(*_):
        nonlocal row
        row += 1

    def router(layer, gate):
        def forward(hidden):
            hidden = hidden.reshape(-1, hidden.shape[-1])
            logits = linear(hidden, gate.weight, getattr(gate, "bias", None))
            is_sigmoid = hasattr(gate, "e_score_correction_bias")
            scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
            chosen = type(gate).forward(gate, hidden)[2]
            own[row, : len(hidden), layer] = chosen.int()
            if experts is not None:
                told = experts[row, : len(hidden), layer]
                chosen = torch.where(told < 0, chosen, told)
            gates = scores.gather(1, chosen)
            if getattr(config, "norm_topk_prob", True):
                gates = gates / gates.sum(-1, keepdim=True)
            return logits, gates * getattr(gate, "routed_scaling_factor", 1.0), chosen

        return forward

    named = {i: dict(x.mlp.named_children()) for i, x in enumerate(model.model.layers)}
    gates = {i: parts.get("gate", parts.get("router")) for i, parts in named.items()}
    gates = {i: gate for i, gate in gates.items() if gate is not None}
    hook = model.register_forward_pre_hook(next_row)
    for layer, gate in gates.items():
        gate.forward = router(layer, gate)
    try:
        yield own
    finally:
        hook.remove()
        for gate in gates.values():
            del gate.forward


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """By family: folder, and by choice what Hugging Face computes with it and would have chosen."""
    root = tmp_path_factory.mktemp("experts")
    deep = {**models.QWEN3_MOE, "num_hidden_layers": 4}
    found = {}
    for name, config in {**models.MOE_FAMILIES, "deep": deep}.items():
        model = models.hf_model(config, root / name)
        with routers(model, TOKENS) as own:
            plain = hugging_face(model)
        other = other_experts(own)
        with routers(model, TOKENS, other) as own_then:
            forced = hugging_face(model)
        torch.save({"own": own, "other": other}, root / name / "experts.pt")
        known = (other >= 0) & (own >= 0)  # -1 of `own`: padding, and a layer without experts
        same = (other[..., :, None] == own_then[..., None, :]).any(-1) & known
        found[name] = (root / name, plain, forced, (same.sum() / known.sum()).item())
    return found


def other_experts(own):
    """As many different experts for each token at random, for one token in five none."""
    generator = torch.Generator().manual_seed(8)
    other = torch.rand((*own.shape[:3], 8), generator=generator).topk(own.shape[3]).indices.int()
    other[torch.rand(own.shape[:2], generator=generator) < 0.2] = -1
    for row, ids in enumerate(TOKENS):
        other[row, len(ids) :] = -1
    return other


@pytest.mark.parametrize("name", LAYOUTS)
def test_replayed_choices_are_computed(references, name):
    ranks, layout, megatron, names = LAYOUTS[name]
    folders = {n: str(references[n][0]) for n in names}
    results = run_ranks(
        ranks, "parity.replay", folders=list(folders.values()), layout=layout, megatron=megatron
    )
    for family, folder in folders.items():
        _, _, (_, logprobs, loss, gradients), agreement = references[family]
        norm = sum(g.double().pow(2).sum() for g in gradients.values()).sqrt().item()
        for result in results:
            none, own, other = (result[f"{folder} {case}"] for case in ("none", "own", "other"))
            tensors = {key: torch.load(r["file"]) for key, r in (("none", none), ("own", own))}
            assert none["agreement"] is None
            assert own["agreement"] == 1
            # Hugging Face's sigmoid routers do not sort their choice: sums run in another order.
            atol = 0 if family.startswith("qwen") or family == "deep" else 1e-6
            for key in ("loss", "grad_norm"):
                assert own[key] == pytest.approx(none[key], abs=atol, rel=0), key
            torch.testing.assert_close(
                tensors["own"]["logprobs"], tensors["none"]["logprobs"], rtol=0, atol=atol
            )
            for key, gradient in tensors["own"]["gradients"].items():
                expected = tensors["none"]["gradients"][key]
                torch.testing.assert_close(gradient, expected, rtol=0, atol=atol)

            assert other["agreement"] == pytest.approx(agreement, abs=1e-6)
            assert other["loss"] == pytest.approx(loss, abs=1e-5)
            assert other["grad_norm"] == pytest.approx(norm, rel=1e-5)
            forced = torch.load(other["file"])
            changed = (forced["logprobs"] - tensors["none"]["logprobs"]).abs().max()
            assert changed > 1e-3, "another choice must change something"
            for row, ids in enumerate(TOKENS):
                apart = forced["logprobs"][row, 1 : len(ids)] - logprobs[row]
                assert apart.abs().max() <= 1e-5, family
            for key, gradient in forced["gradients"].items():
                if key in gradients:  # transformers keeps the experts in one tensor
                    apart = (gradient - gradients[key]).abs().max()
                    assert apart <= 1e-5 * gradients[key].abs().max() + 1e-6, key
