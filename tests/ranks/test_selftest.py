"""The selftest's rows see what they are for: each planted fault fails its own checks, and no others."""

import pytest

from megatron_fp16rl.tools.selftest import waits
from tests.conftest import run_ranks

BOTH = ("qwen3: ", "qwen3-moe: ")
FAULTS = {
    ("scaling", "unscaled_by_half"): [f"{m}gradient norm" for m in BOTH],
    ("scaling", "scale_never_falls"): [f"{m}loss scale after it, over before" for m in BOTH],
    ("scaling", "adam_counts_anew_after_a_checkpoint"): [
        f"{m}update after it, over that before" for m in BOTH
    ],
    ("scaling", "moments_decay_in_a_skip"): [
        f"{m}weights and moments that it changed" for m in BOTH
    ],
    ("parity", "without_temperature"): [
        f"{m}{what}" for m in BOTH for what in ("log-probs", "loss", "gradient norm")
    ],
    ("parity", "sequences_not_parted"): [
        f"{m}{what}" for m in BOTH for what in ("logits", "log-probs", "loss", "gradient norm")
    ],
    ("logprobs", "without_temperature"): ["log-probs, nats", "gradient in fp16"],
    ("logprobs", "copied_to_fp32"): [
        "MiB beside the logits, forward",
        "MiB beside the logits, both ways",
        "log-probs, nats",  # torch's own fp32 is more than two units of the last place off
    ],
    ("products", "reduced_sums"): ["65,536 - 65,536, rows: 1", "65,536 - 65,536, rows: 16"],
    ("products", "rounded_logits"): ["logits in fp32, over a usual one"],
    ("memory", "plan_20_percent_off"): [
        "always there, error of the plan",
        "of an update, error of the plan",
    ],
    ("memory", "a_checkpoint_keeps_a_copy"): ["left by a checkpoint, over what is always there"],
    ("kernels", "angles_in_half"): ["rope, units of the last place"],
    ("kernels", "norms_in_bf16"): ["norm of queries, units of the last place"],
    ("kernels", "attention_in_bf16"): ["attention, units of the last place"],
}


@pytest.mark.parametrize(("row", "fault"), FAULTS)
def test_a_planted_fault_fails_its_row(row, fault):
    (failed,) = run_ranks(1, "selftest.row", name=row, fault=fault)
    assert set(failed) >= set(FAULTS[row, fault])
    if row != "products":  # parts added in fp16 may be a unit off in other sums, too
        assert failed == FAULTS[row, fault]


def test_a_learners_speed_is_counted_in_the_operations_of_its_model():
    (found,) = run_ranks(1, "selftest.speeds")
    for score_s, update_s, flops, product, tokens in found["speeds"]:
        assert tokens == 16 * 64
        assert min(score_s, update_s, product) > 0
        # Four layers: queries and outputs of 128 x 128, keys and values of half of it, three products of 128 x 320;
        # pairs of 4 heads of 32, two products, half of them; 99 logits, made 100 by two more characters, of all but one.
        layers = 4 * (2 * 128 * (2 * 128 + 2 * 64 + 3 * 320) * 64 + 4 * 128 * 64**2 / 2)
        assert flops == pytest.approx(16 * (layers + 2 * 128 * 99 * 63), rel=0.01)
    assert len(found["checks"]) == 6


def test_waits_of_a_micro_batch_are_those_expected_and_one_in_a_layer_is_seen():
    """As far as a CPU tells: copies to a GPU do not show."""
    (found,) = run_ranks(1, "selftest.waits_of_a_micro_batch", in_layers=False)
    found.pop("learner/arrangement.py:arrange")  # of tensors that are on the host everywhere
    assert found == {
        "learner/arrangement.py:predictors": 2,
        "learner/nonfinite.py:inspect": waits.EXPECTED["learner/nonfinite.py:inspect"],
    }
    (found,) = run_ranks(1, "selftest.waits_of_a_micro_batch", in_layers=True)
    (layers,) = (count for site, count in found.items() if site.endswith(":reading"))
    assert layers == 2 * 2  # layers, and passes
    found.pop("learner/arrangement.py:arrange")
    failed = [check.name for check in waits.judge(found) if not check.holds]
    assert [name.rpartition(":")[2] for name in failed] == ["reading"]
