"""The learner on gloo ranks: log-probs, precision, loss scaling, micro-batches."""

import numpy as np
import pytest

from tests import models
from tests.conftest import assert_replicas_agree, run_ranks


@pytest.mark.parametrize(
    ("ranks", "vocabulary", "temperature"), [(1, 64, 1.0), (2, 13, 1.0), (2, 64, 0.6)]
)
def test_token_logprobs_against_torch(ranks, vocabulary, temperature):
    for result in run_ranks(
        ranks, "parity.logprobs", vocabulary=vocabulary, temperature=temperature
    ):
        assert max(result["errors"]) < 5e-6
        assert result["dtypes"] == ["torch.float32", "torch.float16"]


@pytest.mark.parametrize(
    ("layout", "head"),
    [
        ({}, None),
        ({"tensor_parallel": 2}, None),
        ({"tensor_parallel": 2}, "fp32"),
        ({"pipeline_parallel": 2}, "fp32"),
        ({"distributed_optimizer": True}, None),
    ],
    ids=["one", "tp2", "tp2-fp32-head", "pp2-fp32-head", "dp2-distributed-optimizer"],
)
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


# Settings of `learner`, and tokens of the largest micro-batch.
INTERLEAVED = [
    ({"micro_batch_tokens": 64}, 31 + 30),
    ({"micro_batch_tokens": 10_000}, 100),  # two stages want two micro-batches, of 177 tokens here
    ({"micro_batch_tokens": 64, "packing": False}, 2 * 31),
    ({"micro_batch_tokens": 10_000, "packing": False}, 12 * 31),
    ({"micro_batch_tokens": 96, "pad_to_multiple_of": 48}, 2 * 48),
]


def test_interleaved_micro_batches_keep_to_the_budget_and_change_no_number(tmp_path):
    models.hf_model(models.QWEN3 | {"num_hidden_layers": 4}, tmp_path)
    cases = [settings for settings, _ in INTERLEAVED]
    for results in run_ranks(2, "precision.interleaved", folder=str(tmp_path), cases=cases):
        for (settings, largest), result in zip(INTERLEAVED, results, strict=True):
            assert max(result["sizes"]) == largest, settings
            np.testing.assert_allclose(result["scores"], results[0]["scores"], atol=1e-6)


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


@pytest.mark.parametrize("within", ["tensor_parallel", "context_parallel"])
def test_leaders_batch_reaches_each_rank_with_its_layers(within):
    layout = {within: 2, "pipeline_parallel": 2}
    for result in run_ranks(4, "exchange.from_leader", layout=layout, staged=[1, 1000, 1 << 20]):
        assert all(result.values()), result


def test_sequences_move_to_their_rank_and_no_other():
    for results in run_ranks(3, "exchange.moved", staged=[1, 2000, 1 << 20]):
        for result in results:
            assert result["lengths"]
            assert result["same"]
            # What is under way at once: the row that any rank may have for any other, or the limit.
            assert result["largest"] <= max(result["staged"], 3 * result["row"])


@pytest.mark.parametrize(
    "layout",
    [{"distributed_optimizer": True}, {"pipeline_parallel": 2}],
    ids=["dp2-distributed-optimizer", "pp2"],
)
def test_reference_and_learner_keep_their_weights(layout):
    for result in run_ranks(2, "precision.reference", layout=layout):
        assert result.pop("moved") > 0.1
        assert all(result.values()), result


def test_weights_beyond_the_servers_range_are_not_exported():
    ((infinite, large),) = run_ranks(1, "precision.weights_beyond")
    assert "decoder.final_layernorm.weight" in infinite
    assert "Nothing was published" in infinite
    assert "final_layernorm.weight reaches 70144" in large
    assert "beyond torch.float16 (largest number 65504)" in large


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
