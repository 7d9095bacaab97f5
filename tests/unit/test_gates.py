"""Alarms on metrics."""

import pytest
from pydantic import ValidationError

from megatron_fp16rl.data.batch import Prompt, Sample
from megatron_fp16rl.learner.checkpoint_files import available
from megatron_fp16rl.metrics.gates import GateStop, check, judge, of, unknown
from megatron_fp16rl.recipe import Gate, load
from megatron_fp16rl.rollout.recording import write_samples
from megatron_fp16rl.tools import recipes
from tests.conftest import run_ranks

KL = "mismatch/kl_k3"


def rung(values, **settings):
    """What a gate says after steps with these values of its metric; those with ... lack it."""
    gate = Gate(metric=KL, **settings)
    return check([gate], [{} if value is ... else {KL: value} for value in values])


def test_a_gate_rings_when_the_mean_of_its_window_leaves_the_bounds():
    assert rung([5e-3], above=1e-3, window=2) == [], "the window is not full"
    assert rung([0.0, 0.0, 1e-3], above=1e-3, window=2) == []
    said = "gate: mismatch/kl_k3 is 0.0015 (mean of 2), above 0.001"
    assert rung([0.0, 1e-3, 2e-3], above=1e-3, window=2) == [said]
    assert rung([0.1, 0.3], below=0.2) == []
    assert rung([0.3, 0.1], below=0.2) == ["gate: mismatch/kl_k3 is 0.1, below 0.2"]


def test_rows_without_the_metric_neither_ring_nor_count():
    assert rung([0.1, 0.1, ...], below=0.5) == []
    assert rung([0.1, ..., None], below=0.5, window=2) == []
    assert len(rung([0.1, ..., None, 0.2], below=0.5, window=2)) == 1


def test_a_gate_can_stop_the_run():
    assert rung([5e-4], above=1e-3, action="stop") == []
    with pytest.raises(GateStop, match=r"kl_k3 is 0\.002, above 0\.001"):
        rung([2e-3], above=1e-3, action="stop")


def test_a_metric_that_does_not_exist_is_an_error_not_silence():
    rows = [{KL: 1.0}, {"eval/accuracy": 0.5}]
    assert "did you mean 'mismatch/kl_k3'" in unknown([Gate(metric=f"{KL}3", above=1)], rows)
    assert unknown([Gate(metric=KL, above=1)], rows) is None


def test_gates_on_the_loss_scale_are_passed_over_where_there_is_none():
    """What a run in BF16 says of itself; see test_train.py for the run itself."""
    recipe = recipes.find("qwen3-8b-dapo-fp16-2n8g")
    row = [{"eval/accuracy": 0.1, "mismatch/kl_k3": 1e-3, "fp16/overflow_source": None}]
    assert {gate.metric for gate in of(load(recipe))} == {"mismatch/kl_k3", "fp16/skipped_total"}
    assert "no metric 'fp16/skipped_total'" in unknown(of(load(recipe)), row)
    left = of(load(recipe, ["precision=bf16"]))
    assert [gate.metric for gate in left] == ["mismatch/kl_k3"]
    assert unknown(left, row) is None


def test_at_the_end_all_gates_are_asked_and_marks_for_the_end_only_then():
    mark = Gate(metric="eval/accuracy", below=0.85, at_end=True)
    alarm = Gate(metric="mismatch/kl_k3", above=1e-3)
    run = [{"eval/accuracy": 0.2, "mismatch/kl_k3": 1e-4}, {"mismatch/kl_k3": 1e-4}]
    assert check([mark, alarm], run[:1]) == []
    assert judge([mark, alarm], run) == ["gate: eval/accuracy is 0.2, below 0.85"]
    assert judge([mark, alarm], [*run, {"eval/accuracy": 0.9, "mismatch/kl_k3": 2e-3}]) == [
        "gate: mismatch/kl_k3 is 0.002, above 0.001"
    ]
    # Nothing was held out, or the run was too short: nobody knows whether the mark is reached.
    assert judge([mark, alarm], [{}]) == ["gate: eval/accuracy has 0 value(s), and its window is 1"]


def test_gates_that_make_no_sense_are_refused():
    with pytest.raises(ValidationError, match="give above, below or both"):
        Gate(metric=KL)
    with pytest.raises(ValidationError, match="nothing left to stop"):
        Gate(metric=KL, below=0.85, at_end=True, action="stop")


def test_what_was_learnt_is_saved_before_a_gate_stops_the_run(tmp_path):
    for step in range(2):
        rewards, prompt = [1.0, 0.0] * 8, Prompt("", [2, 12], "")
        samples = [
            Sample(prompt, i // 4, [i % 5 + 2, 1], [-2.0, -2.0], "", False, 0, reward)
            for i, reward in enumerate(rewards)
        ]
        write_samples(tmp_path / "rollouts", step, 0, samples)
    ended = run_ranks(2, "resuming.gated_run", folder=str(tmp_path))
    assert ended == ["gate: reward/mean is 0.5 (mean of 2), above 0.1"] * 2  # on both ranks
    (saved,) = available(tmp_path / "checkpoints")
    assert saved.step == 2
    assert saved.faults() == []
