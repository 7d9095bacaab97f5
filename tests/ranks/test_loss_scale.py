"""Overflows: one rank sees an infinite gradient, and all ranks skip the update together."""

import numpy as np
import pytest

from tests.conftest import assert_replicas_agree, run_ranks

EXPERTS_CUT = {"tensor_parallel": 2, "sequence_parallel": True, "expert_tensor_parallel": 2}


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ({}, ["dense", "expert"]),
        (EXPERTS_CUT, ["expert"]),
        ({"pipeline_parallel": 2}, ["dense", "embedding"]),
        ({"expert_parallel": 2}, ["expert"]),
    ],
    ids=["dp2", "tp2", "pp2", "ep2"],
)
def test_overflow_on_one_rank_skips_the_update_on_all(layout, kinds):
    """With and without the distributed optimizer. Each kind of parameter; at a layout, those that it shards."""
    arguments = {"layout": layout, "kinds": kinds, "family": "qwen3-moe"}
    results = run_ranks(2, "precision.overflow", **arguments)
    for result in results:
        stopped = result.pop("stopped")
        assert "3 updates in a row overflowed; the loss scale is now 128" in stopped
        # The worker spoils gradients after the reduction: run again, the same update is sound.
        assert "did not happen again" in stopped
    for case in results[0]:
        assert_replicas_agree([result[case]["shards"] for result in results])
        for result in results:
            check_skipped(result[case], layout)


def check_skipped(result, layout):
    log = result["log"]
    assert [entry["stepped"] for entry in log] == [True, False, True, True]
    assert [entry["changed"] for entry in log] == [True, False, True, True]
    # Halved by the overflow, doubled after a window of two good updates.
    assert [entry["scale"] for entry in log] == [1024, 512, 512, 1024]
    assert [entry["skipped"] for entry in log] == [[0, 0], [1, 1], [1, 0], [1, 0]]
    # Two updates of warm-up, then down to zero at the tenth; a skipped update does not count.
    expected = [5e-4, None, 1e-3, 7e-3 / 8]
    assert [entry["lr"] for entry in log] == pytest.approx(expected)
    victim, kind = result["victim"], result["kind"]
    stage = victim if "pipeline_parallel" in layout else 0
    assert f"rank {victim}, stage {stage}: {kind} " in log[1]["source"]
    # But for the skipped update, nothing happened. The gradients were rounded at another scale
    # afterwards, so weights differ a little; one update more or less would be 1e-3.
    apart = np.abs(np.subtract(result["weights"], result["without"]))
    assert apart.max() < 2e-3
    assert apart.mean() < 2e-5


def test_fifty_updates_follow_fp32_from_any_initial_scale():
    """Within 2 % of fp32 at every update, while the loss falls to a third."""
    (results,) = run_ranks(1, "precision.fifty_updates", scales=[0.25, 2**24])
    exact = results.pop("fp32 1")["losses"]
    assert exact[-1] < exact[0] / 3
    for result in results.values():
        np.testing.assert_allclose(result["losses"], exact, rtol=2e-2)
    assert results["fp16 0.25"]["skipped"] == 0
    assert results[f"fp16 {2**24:g}"]["skipped"] > 0


def test_underflow_in_backward_is_counted():
    """At a good scale none; at lower ones as many as fp32 says, and those lost on the way to them."""
    arguments = {"layout": {"distributed_optimizer": True}, "exponents": [15, -8, -12, -22]}
    results = run_ranks(2, "precision.vanishing", **arguments)
    for result in results:
        assert result["found"] == results[0]["found"]
    found, expected = results[0]["found"], results[0]["expected"]
    assert found[0] < 1e-3  # sums of two ranks' fp16 numbers may be zero, one in ten thousand
    assert 0.02 < expected[1] < 0.1 < 0.4 < expected[2] < 0.8
    for share, least in zip(found[1:3], expected[1:3], strict=True):
        assert 0.9 * least < share < 1.3 * least
    assert found[3] == 1


def test_unused_adapter_matrices_are_no_underflow():
    """One of each adapter's two matrices begins as zero, so the other's first gradient is zero."""
    adapters = {"family": "qwen3-tied", "lora": {"rank": 4, "alpha": 8.0}}
    (result,) = run_ranks(1, "precision.vanishing", layout={}, exponents=[15, -22], **adapters)
    assert result["found"][0] < 1e-3
    assert result["found"][1] == 1
