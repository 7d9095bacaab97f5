"""The learner on gloo ranks: log-probs, precision, loss scaling, micro-batches."""

import numpy as np
import pytest

from tests import models
from tests.conftest import assert_replicas_agree, run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("vocabulary", "temperature"), [(13, 1.0), (64, 0.6)])
def test_token_logprobs_against_torch(ranks, vocabulary, temperature):
    for result in run_ranks(
        ranks, "parity.logprobs", vocabulary=vocabulary, temperature=temperature
    ):
        assert max(result["errors"]) < 5e-6
        assert result["dtypes"] == ["torch.float32", "torch.float16"]


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
@pytest.mark.parametrize("head", [None, "fp32"])
def test_fp16_follows_fp32_at_any_loss_scale(layout, head):
    results = run_ranks(2 if layout else 1, "precision.precision", layout=layout, head=head)
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


def test_adam_with_the_papers_eps_moves_the_smallest_gradients():
    """And divides nothing by zero: in a first step all that has a gradient moves by lr, the rest stays."""
    (result,) = run_ranks(1, "precision.first_adam_step", eps=1e-15, lr=1e-2)
    assert result["eps"] == [1e-15]
    assert result["small"] > 0, "no gradient that 1e-8 would have held back"
    assert result["with"] == pytest.approx([1e-2, 1e-2], rel=1e-3)
    assert result["without"] == 0


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 2, "model_chunks": 2},
    ],
    ids=["dp2", "tp2-sp", "pp2", "pp2-interleaved"],
)
def test_padding_to_few_lengths_changes_no_number(tmp_path, layout):
    models.hf_model(models.QWEN3 | {"num_hidden_layers": 4}, tmp_path)
    for rank in run_ranks(2, "precision.padded", folder=str(tmp_path), layout=layout):
        exact, padded = rank["1"], rank["48"]
        assert {seq % 48 for _, seq in padded["shapes"]} == {0}
        assert {seq % 48 for _, seq in exact["shapes"]} != {0}
        assert all(rows == 1 or rows * seq <= 96 for rows, seq in padded["shapes"])
        np.testing.assert_allclose(padded["scores"], exact["scores"], atol=1e-6)
        assert padded["loss"] == pytest.approx(exact["loss"], rel=1e-6)
        assert padded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=1e-6)


@pytest.mark.parametrize(
    ("packing", "few", "many"), [(True, 31 + 30, 100), (False, 2 * 31, 12 * 31)]
)
def test_interleaved_micro_batches_keep_to_the_budget(tmp_path, packing, few, many):
    models.hf_model(models.QWEN3 | {"num_hidden_layers": 4}, tmp_path)
    arguments = {"folder": str(tmp_path), "packing": packing}
    for rank in run_ranks(2, "precision.interleaved", budget=64, **arguments):
        assert max(rank["sizes"]) == few
    whole = run_ranks(2, "precision.interleaved", budget=10_000, **arguments)[0]
    assert max(whole["sizes"]) == many  # two stages want two micro-batches, of 177 tokens here
    np.testing.assert_allclose(rank["scores"], whole["scores"], atol=1e-5)


def test_micro_batches_and_ranks_do_not_change_the_update():
    budgets = [10_000, 64, 31]
    (alone,) = run_ranks(1, "precision.micro_batches", budgets=budgets)
    pair = run_ranks(2, "precision.micro_batches", budgets=budgets)
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


def test_ranks_share_tokens_and_compute_the_same_updates():
    """Two ranks make the updates that one makes, on halves of the tokens, whoever sampled them."""
    (alone,) = run_ranks(1, "precision.updates")
    pair = run_ranks(2, "precision.updates")
    assert alone["metrics"].pop("fp16/overflow_source") is None
    whole = np.array(alone["tokens"])
    assert len(whole) == 2
    for result in pair:
        np.testing.assert_allclose(np.array(result["tokens"]), whole / 2, rtol=0.05)
        for name, value in alone["metrics"].items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4), name
        np.testing.assert_allclose(result["weights"], alone["weights"], atol=1e-5)
    assert (np.array(pair[0]["tokens"]) + pair[1]["tokens"]).tolist() == whole.tolist()


@pytest.mark.parametrize("staged", [1, 1000, 1 << 20])
@pytest.mark.parametrize("within", ["tensor_parallel", "context_parallel"])
def test_leaders_batch_reaches_each_rank_with_its_layers(staged, within):
    layout = {within: 2, "pipeline_parallel": 2}
    for result in run_ranks(4, "exchange.from_leader", layout=layout, staged=staged):
        assert all(result.values()), result


@pytest.mark.parametrize("staged", [1, 2000, 1 << 20])
def test_sequences_move_to_their_rank_and_no_other(staged):
    for result in run_ranks(3, "exchange.moved", staged=staged):
        assert result["lengths"]
        assert result["same"]
        # What is under way at once: the row that any rank may have for any other, or the limit.
        assert result["largest"] <= max(staged, 3 * result["row"])


@pytest.mark.parametrize(
    "layout",
    [{"distributed_optimizer": True}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}],
    ids=["dp2-distributed-optimizer", "tp2", "pp2"],
)
def test_reference_and_learner_keep_their_weights(layout):
    for result in run_ranks(2, "precision.reference", layout=layout):
        assert result.pop("moved") > 0.1
        assert all(result.values()), result


def test_non_finite_forward_pass_is_no_overflow():
    (result,) = run_ranks(1, "precision.forward_fault")
    for name in ("train", "score"):
        assert "NonFiniteForward" in result["said"][name]
        assert "decoder.final_layernorm.weight is not finite" in result["said"][name]
    assert "decoder.final_layernorm.weight" in result["said"]["export"]
    assert "Nothing was published" in result["said"]["export"]
    assert "final_layernorm.weight reaches 70144" in result["said"]["beyond"]
    assert "beyond torch.float16 (largest number 65504)" in result["said"]["beyond"]
    assert result["scale"] == 2**15


@pytest.mark.parametrize("layout", [{}, {"pipeline_parallel": 2}], ids=["dp2", "pp2"])
def test_where_the_loss_needs_no_scores_the_first_update_tells_the_mismatch(layout):
    """On every tenth step a pass scores all; on the others mismatch/* is what that pass would have given."""
    for rank in run_ranks(2, "comparing.unscored", layout=layout):
        assert rank["scores"] == [True, False, False, True]
        assert rank["before"] == {}
        assert rank["after"] == pytest.approx(rank["expected"], rel=1e-4)
        assert rank["noise"] == pytest.approx([0, 1e-2], abs=1e-6)
        assert rank["since"] != pytest.approx(rank["expected"], rel=1e-3)


def test_halves_that_do_not_fill_an_interleaved_pipeline_are_not_scored_again():
    """Three sequences of a micro-batch each are none of its multiples of two."""
    for noise in run_ranks(2, "comparing.interleaved_noise", counts=[2, 6, 8]):
        assert noise == [None, None, 0.0]
