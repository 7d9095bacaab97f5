"""The selftest's rows see what they are for: each planted fault fails its own checks, and no others."""

import pytest

from megatron_fp16rl.tools.selftest import waits
from tests.conftest import run_ranks

BOTH = ("qwen3", "qwen3-moe")
SCALING = (
    "gradient norm",
    "loss scale after it, over before",
    "weights and moments that it changed",
    "update after it, over that before",
)
PARITY = ("log-probs", "loss", "gradient norm")
# Of a row, faults that are planted together, for none fails another's checks; and these checks.
CASES = [
    (
        "scaling",
        "unscaled_by_half scale_never_falls moments_decay_in_a_skip adam_counts_anew_after_a_checkpoint",
        [f"{model}: {what}" for model in BOTH for what in SCALING],
    ),
    ("parity", "without_temperature", [f"{m}: {what}" for m in BOTH for what in PARITY]),
    (
        "parity",
        "sequences_not_parted",
        [f"{model}: {what}" for model in BOTH for what in ("logits", *PARITY)],
    ),
    ("logprobs", "without_temperature", ["log-probs, nats", "gradient in fp16"]),
    (
        "logprobs",
        "copied_to_fp32",
        [
            "MiB beside the logits, forward",
            "MiB beside the logits, both ways",
            "log-probs, nats",  # torch's own fp32 is more than two units of the last place off
        ],
    ),
    ("products", "reduced_sums", ["65,536 - 65,536, rows: 1", "65,536 - 65,536, rows: 16"]),
    ("products", "rounded_logits", ["logits in fp32, over a usual one"]),
    (
        "memory",
        "plan_20_percent_off a_checkpoint_keeps_a_copy",
        [
            "always there, error of the plan",
            "of an update, error of the plan",
            "left by a checkpoint, over what is always there",
        ],
    ),
    (
        "kernels",
        "angles_in_half norms_in_bf16 attention_in_bf16",
        [f"{what}, units of the last place" for what in ("norm of queries", "rope", "attention")],
    ),
]


@pytest.mark.parametrize(("row", "faults", "expected"), CASES)
def test_planted_faults_fail_their_checks_and_no_others(row, faults, expected):
    (failed,) = run_ranks(1, "selftest.row", name=row, faults=faults.split())
    assert set(failed) >= set(expected)
    if row != "products":  # parts added in fp16 may be a unit off in other sums, too
        assert sorted(failed) == sorted(expected)


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
