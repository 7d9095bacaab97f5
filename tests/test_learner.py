"""The learner on gloo ranks: log-probs, precision, loss scaling, micro-batches."""

import numpy as np
import pytest

from tests.conftest import run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("vocabulary", "temperature"), [(13, 1.0), (64, 0.6)])
def test_token_logprobs_against_torch(ranks, vocabulary, temperature):
    for result in run_ranks(ranks, "logprobs", vocabulary=vocabulary, temperature=temperature):
        assert max(result["errors"]) < 5e-6
        assert result["dtypes"] == ["torch.float32", "torch.float16"]


def assert_replicas_agree(ranks):
    """Shards of the same name are bit-equal on all ranks that hold them."""
    seen = {}
    for shards in ranks:
        for name, digest in shards.items():
            assert seen.setdefault(name, digest) == digest, name


LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
        {"distributed_optimizer": False},
        {"distributed_optimizer": True},
    ],
    ids=["one", "tp2", "pp2", "dp2", "dp2-distributed-optimizer"],
)


@LAYOUTS
def test_fp16_follows_fp32_whatever_the_loss_scale(layout):
    results = run_ranks(2 if layout else 1, "precision", layout=layout)
    for result in results:
        exact = result.pop("fp32 1")
        assert len(result) == 3
        for name, half in result.items():
            assert half["stepped"], name
            assert half["loss"] == pytest.approx(exact["loss"], rel=1e-3), name
            assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=1e-3), name
            # One Adam step moves each weight by about lr = 1e-3; fp16 weights are rounded to 5e-4
            # of their size, at most 0.1 here (but for the norms, which are near 1).
            apart = np.abs(np.subtract(half["weights"], exact["weights"]))
            assert np.mean(apart) < 5e-5, name
    assert_replicas_agree([result["fp16 1"]["shards"] for result in results])


@LAYOUTS
def test_an_overflow_on_one_rank_skips_the_update_on_all(layout):
    ranks = 2 if layout else 1
    results = run_ranks(ranks, "overflow", layout=layout)
    assert_replicas_agree([result["with"]["shards"] for result in results])
    for result in results:
        log = result["with"]["log"]
        assert [entry["stepped"] for entry in log] == [True, True, False, True, True, True]
        assert [entry["changed"] for entry in log] == [True, True, False, True, True, True]
        # Halved by the overflow, doubled after a window of three good updates.
        assert [entry["scale"] for entry in log] == [1024, 1024, 512, 512, 512, 1024]
        assert [entry["skipped"] for entry in log] == [
            [0, 0],
            [0, 0],
            [1, 1],
            [1, 0],
            [1, 0],
            [1, 0],
        ]
        # Two updates of warm-up, then down to zero at the tenth; a skipped update does not count.
        expected = [5e-4, 1e-3, None, 7e-3 / 8, 6e-3 / 8, 5e-3 / 8]
        assert [entry["lr"] for entry in log] == pytest.approx(expected)
        assert f"rank {ranks - 1}: " in log[2]["source"]
        assert "weight" in log[2]["source"]
        assert "3 updates in a row overflowed; the loss scale is now 128" in result["stopped"]
        # But for the skipped update, nothing happened. The gradients were rounded at another scale
        # afterwards, so weights may differ in their last bit.
        apart = np.abs(np.subtract(result["with"]["weights"], result["without"]["weights"]))
        assert apart.max() < 2e-3
        assert apart.mean() < 1e-6


def test_micro_batches_and_ranks_do_not_change_the_update():
    budgets = [10_000, 64, 31]
    (alone,) = run_ranks(1, "micro_batches", budgets=budgets)
    pair = run_ranks(2, "micro_batches", budgets=budgets)
    counts = [alone[str(budget)][0] for budget in budgets]
    assert counts[0] == 1
    assert counts == sorted(set(counts)), "each budget must give more micro-batches"
    _, loss, norm, gradients = alone[str(budgets[0])]
    assert np.abs(gradients).max() > 0.1
    for result in (alone, *pair):
        for _, other_loss, other_norm, other_gradients in result.values():
            assert other_loss == pytest.approx(loss, rel=1e-6)
            assert other_norm == pytest.approx(norm, rel=1e-6)
            np.testing.assert_allclose(other_gradients, gradients, atol=1e-6)


def test_a_fault_in_the_forward_pass_is_no_overflow():
    (result,) = run_ranks(1, "forward_fault")
    for name in ("train", "score"):
        assert "NonFiniteForward" in result["said"][name]
        assert "tokens of the sequence" in result["said"][name]
    assert "decoder.final_layernorm.weight" in result["said"]["export"]
    assert "Nothing was published" in result["said"]["export"]
    assert result["scale"] == 2**15
