"""A run that goes on from a checkpoint is the run that was never stopped."""

import numpy as np
import pytest

from tests.conftest import assert_replicas_agree, run_ranks

DENSE, MOE = "qwen3-tied", "qwen3-moe"
LAYOUTS = {
    "dp2-distributed-optimizer": ({"distributed_optimizer": True}, DENSE),
    "tp2": ({"tensor_parallel": 2}, DENSE),
    "pp2": ({"pipeline_parallel": 2}, DENSE),
    "ep2": ({"expert_parallel": 2}, MOE),
    "ep2-distributed-optimizer": ({"expert_parallel": 2, "distributed_optimizer": True}, MOE),
}
OTHERS = {
    "dp2-distributed-optimizer": [(1, {})],
    "tp2": [(1, {}), (2, {"distributed_optimizer": True})],
    "pp2": [(1, {}), (2, {"tensor_parallel": 2})],
    "ep2": [(1, {})],
    "ep2-distributed-optimizer": [(2, {"pipeline_parallel": 2})],
}


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request, tmp_path_factory):
    """A run of five updates, a checkpoint, and three more updates."""
    layout, family = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    arguments = {"folder": str(folder), "family": family, "before": 5, "after": 3}
    return request.param, layout, arguments, run_ranks(2, "resume", layout=layout, **arguments)


def test_a_resumed_learner_goes_on_to_the_last_bit(saved):
    _, layout, arguments, first = saved
    second = run_ranks(2, "resume", layout=layout, **arguments)
    for whole, resumed in zip(first, second, strict=True):
        assert resumed["progress"] == {
            "step": 5,
            "version": 5,
            "tokens": 7,
            "accuracy_before": 0.25,
        }
        assert resumed["log"] == whole["log"]
        assert resumed["shards"] == whole["shards"]
        assert resumed["scaler"] == whole["scaler"]
        assert resumed["scaler"]["skipped_total"] == 1
        assert resumed["at_checkpoint"] == whole["at_checkpoint"]
    assert_replicas_agree([result["shards"] for result in second])


def test_a_checkpoint_is_read_at_other_layouts(saved):
    name, _, arguments, first = saved
    for ranks, layout in OTHERS[name]:
        resumed = run_ranks(ranks, "resume", layout=layout, **arguments)[0]
        assert resumed["at_checkpoint"] == first[0]["at_checkpoint"]
        for (loss, stepped, norm, lr), expected in zip(
            resumed["log"], first[0]["log"], strict=True
        ):
            assert (stepped, lr) == (expected[1], expected[3])
            assert loss == pytest.approx(expected[0], rel=1e-4)
            assert norm == pytest.approx(expected[2], rel=5e-3)
        apart = np.abs(np.subtract(resumed["weights"], first[0]["weights"]))
        assert apart.max() < 2e-3
        assert apart.mean() < 1e-5
