"""Corrections against their definitions in NumPy, one sequence after the other."""

import numpy as np
import pytest
import torch

from megatron_fp16rl.algorithms import Algorithm, corrections, losses
from megatron_fp16rl.recipe import Algorithm as Settings
from megatron_fp16rl.recipe.algorithm import Correction
from tests.unit.losses import example, inputs, tensors
from tests.unit.test_algorithms import random_batch


def numpy_weights(pi, mu, mask, ratio, action, low, high):
    """One sequence after the other, as the definitions read."""
    result = np.zeros_like(pi)
    for row in range(len(pi)):
        kept = mask[row]
        if not kept.any():
            continue
        d = (pi - mu)[row, kept]
        value = {
            "token": np.exp(d),
            "sequence": np.full_like(d, np.exp(d.sum())),
            "geometric": np.full_like(d, np.exp(d.mean())),
            "k3": np.full_like(d, (np.exp(d) - 1 - d).mean()),
            "k3_max": np.full_like(d, (np.exp(d) - 1 - d).max()),
        }[ratio]
        low_bound, high_bound = low or 0.0, np.inf if high is None else high
        inside = (low_bound <= value) & (value <= high_bound)
        result[row, kept] = {
            "truncate": np.clip(value, low_bound, high_bound),
            "mask": np.where(inside, value, 0.0),
            "reject": inside.astype(float),
        }[action]
    return result


@pytest.mark.parametrize("action", ["truncate", "mask", "reject"])
@pytest.mark.parametrize(
    ("ratio", "low", "high"),
    [
        ("token", None, 1.2),
        ("token", 0.5, 2.0),
        ("sequence", None, 2.0),
        ("geometric", None, 1.1),
        ("geometric", 0.9, 1.1),
        ("k3", None, 0.4),
        ("k3_max", None, 1.5),
    ],
)
def test_corrections(ratio, action, low, high):
    if ratio.startswith("k3") and action != "reject":
        pytest.skip("not a ratio to weigh with")
    pi, mu, _, mask = example(seed=2, shape=(9, 7))
    mask[3] = False
    correction = Correction.model_construct(ratio=ratio, action=action, low=low, high=high)
    weight, stats = corrections.weights(*tensors(pi, mu, mask), correction)
    expected = numpy_weights(pi, mu, mask, ratio, action, low, high)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    unbounded = numpy_weights(pi, mu, mask, ratio, "mask", None, None)
    bounded = numpy_weights(pi, mu, mask, ratio, "mask", low, high)
    assert stats["corrected"] == (unbounded != bounded).sum() > 0
    assert stats["weight"].item() == pytest.approx(expected.sum(), rel=1e-5)


def test_ratios_that_overflow_are_bounded():
    """50 nats a token, a thousand tokens: the ratio of the sequence is no number any more."""
    mask = torch.ones(2, 1000, dtype=torch.bool)
    mu = torch.full((2, 1000), -50.0)
    mu[1] = 0.0
    pi = -50.0 - mu

    def weights(ratio, action, high):
        correction = Correction.model_construct(ratio=ratio, action=action, low=None, high=high)
        return corrections.weights(pi, mu, mask, correction)[0]

    for ratio in ("token", "sequence", "geometric"):
        truncated = weights(ratio, "truncate", 2.0)
        assert truncated[0].tolist() == [2.0] * 1000
        assert (truncated[1] < 1e-20).all()
        assert weights(ratio, "mask", 2.0)[0].abs().max() == 0
        assert torch.isfinite(weights(ratio, "truncate", None)).all()
    logprobs = pi.clone().requires_grad_()
    for loss in (losses.ppo_clip, losses.gspo, losses.cispo):
        values, _ = loss(inputs(logprobs, mu, -torch.ones(2, 1000), mask))
        assert torch.isfinite(values).all()


def test_corrections_weigh_with_the_old_policy_and_policy_gradients_with_the_new():
    batch, logprobs = random_batch()
    correction = {"ratio": "sequence", "action": "truncate", "high": 2.0}
    for loss, numerator in (("ppo_clip", batch.pi_logprobs), ("policy_gradient", logprobs)):
        plain = Algorithm(Settings(loss=loss), 10)
        corrected = Algorithm(Settings(loss=loss, correction=correction), 10)
        prepared = plain.prepare(batch)
        weight, _ = corrections.weights(
            numerator, batch.mu_logprobs, batch.mask, Correction(**correction)
        )
        ours, stats = corrected.token_losses(logprobs, prepared)
        np.testing.assert_allclose(
            ours, plain.token_losses(logprobs, prepared)[0] * weight, rtol=1e-6
        )
        assert stats["corrected"] > 0
