"""Packed sequences and context parallelism beyond parity: where tokens are, and losses of whole sequences."""

import pytest

from tests import models
from tests.conftest import run_ranks

ROWS, CP2 = {"packing": False}, {"context_parallel": 2}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dense"
    models.hf_model(models.QWEN3, folder)
    return str(folder)


def off_policy(folder, ranks=1, without=None, **layout):
    """Of all ranks, which must agree."""
    results = run_ranks(ranks, "packing.off_policy", folder=folder, layout=layout, without=without)
    first = results[0]
    assert all(r["loss"] == first["loss"] for r in results) or without
    return first


@pytest.mark.parametrize("packed", [True, False])
def test_every_token_is_on_one_context_parallel_rank_and_knows_where(packed):
    """Inverse to each other, and as Megatron cuts sequences."""
    (cases,) = run_ranks(1, "packing.arrangements", packed=packed)
    for ranks, case in cases.items():
        assert case["inverse"], ranks
        assert case["each_once"], ranks
    assert cases["2"]["first"] == ([0, 1, 6, -1] if packed else [0, 1, 2, 3])


def test_losses_of_whole_sequences_are_the_same_at_every_layout(folder):
    rows, packed = off_policy(folder, **ROWS), off_policy(folder)
    assert packed["padding"] == 0
    assert rows["padding"] > 0.09
    layouts = [(2, CP2), (2, {**CP2, **ROWS}), (4, {**CP2, "pipeline_parallel": 2})]
    others = {str(layout): off_policy(folder, ranks, **layout) for ranks, layout in layouts}
    for layout, other in {"packed": packed, **others}.items():
        assert other["loss"] == pytest.approx(rows["loss"], rel=1e-6), layout
        assert other["norm"] == pytest.approx(rows["norm"], rel=1e-6), layout


def test_the_check_sees_sequences_that_are_not_parted_and_parts_that_are_not_joined(folder):
    right = off_policy(folder)
    for ranks, without, layout in ((1, "parting", {}), (2, "sharing", CP2)):
        wrong = off_policy(folder, ranks, without, **layout)
        assert abs(wrong["loss"] / right["loss"] - 1) > 1e-3, without


@pytest.mark.parametrize("layout", [{}, ROWS, TP2, CP2], ids=["one", "rows", "tp2", "cp2"])
def test_there_are_logits_of_the_tokens_that_are_asked_for_alone(folder, layout):
    ranks = 2 if layout in (TP2, CP2) else 1
    results = run_ranks(ranks, "packing.asked_for", folder=folder, layout=layout)
    for result in results:
        assert result["apart"] < 1e-6
        assert result["last"] == 12
    parts = ranks if layout == CP2 else 1  # others have all of the rows, and some of the columns
    assert sum(result["asked"] for result in results) * parts == 12 * ranks
    assert results[0]["whole"] > 3 * results[0]["asked"]


def test_fused_rope_is_refused_where_it_would_leave_out_yarns_factor():
    """By Megatron-core 0.19.2, of packed sequences."""
    ((unfused, fused),) = run_ranks(1, "packing.fused_rope")
    assert unfused == ""
    assert "learner.megatron.apply_rope_fusion: true would leave YaRN's factor out" in fused
