"""Simulated steps against the roofline, and what the simulation must keep."""

from dataclasses import replace

import pytest

from megatron_fp16rl.tools.plan import ahead, times
from megatron_fp16rl.tools.plan.ahead import Setup, simulate
from tests.unit.test_plan import ANCHORED, H100, LLAMA_8B, recipe

# Four leaders, three servers: shares are not even, and a server holds a third of its responses.
SETUP = Setup(
    ahead=0,
    leaders=4,
    prompts=16,
    samples=4,
    prompt=50.0,
    response=300.0,
    most=1000,
    servers=3,
    room=8,
    decode_step=lambda running, cached: 0.02 + 1e-3 * running + 1e-7 * cached,
    prefill=1e-4,
    learn=5.0,
    sync=1.0,
)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_equal_lengths_take_as_long_as_the_roofline_says(steps_ahead, monkeypatch):
    monkeypatch.setattr(times, "CACHED_SHARE", 0.5)  # of responses that are all alike
    planned = recipe({"servers": 16, "ahead": steps_ahead}, {"ranks": 4}, **ANCHORED)
    arguments = planned, LLAMA_8B, H100, 4090
    roofline, simulated = times.estimate(*arguments), simulate(times.setup(*arguments))
    assert simulated.step_s == pytest.approx(roofline.step_s, rel=0.01)
    assert simulated.learner_waits_s == pytest.approx(roofline.learner_waits_s, rel=0.01)
    assert simulated.servers_wait_s == pytest.approx(roofline.servers_wait_s, rel=0.01, abs=0.1)


@pytest.mark.parametrize("steps_ahead", [0, 1, 2, 4])
def test_every_token_is_learnt_dropped_or_waits(steps_ahead, monkeypatch):
    ages, take = [], ahead._take

    def noted(stream, share):
        taken = take(stream, share)
        ages.extend(piece[0] for group in taken for r in group.responses for piece in r.pieces[:1])
        assert all(r.sampled == r.length for group in taken for r in group.responses)
        return taken

    monkeypatch.setattr(ahead, "_take", noted)
    simulated = simulate(replace(SETUP, ahead=steps_ahead), steps=10)
    counts = dict(simulated.totals)
    assert counts.pop("sampled") == sum(counts.values())
    assert bool(counts["waiting"]) == (steps_ahead > 1)
    # Batches of 64 responses in order: that of period p is learnt at p, or at p + 1 if it is ahead.
    learners = [i // 64 + min(1, steps_ahead) for i in range(len(ages))]
    oldest = max(learner - age for learner, age in zip(learners, ages, strict=True))
    assert oldest == steps_ahead if steps_ahead < 4 else 2 < oldest <= 4
    assert simulate(replace(SETUP, ahead=steps_ahead), steps=10) == simulated


def test_a_plan_of_several_steps_ahead_is_simulated():
    planned = recipe({"servers": 16, "ahead": 1}, {"ranks": 8}, **ANCHORED)
    one = times.estimate(planned, LLAMA_8B, H100)
    deep = planned.model_copy(update={"rollout": planned.rollout.model_copy(update={"ahead": 4})})
    four = times.estimate(deep, LLAMA_8B, H100)
    assert four.one_step_off_s == one.one_step_off_s
    assert four.step_s == simulate(times.setup(deep, LLAMA_8B, H100)).step_s < one.step_s
    assert 1 < four.breakdown["token_age"] <= 4
