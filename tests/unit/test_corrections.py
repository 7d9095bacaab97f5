"""Corrections against their definitions in NumPy, one sequence after the other."""

import numpy as np
import pytest
import torch

from megatron_fp16rl.algorithms import corrections, losses
from megatron_fp16rl.recipe.algorithm import Correction
from tests.unit.losses import algorithm, example, inputs, random_batch, tensors


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


@pytest.mark.parametrize(
    ("ratio", "low", "high", "actions"),
    [
        ("token", None, 1.2, ("truncate", "mask", "reject")),
        ("token", 0.5, 2.0, ("truncate", "mask", "reject")),
        ("sequence", None, 2.0, ("truncate", "mask", "reject")),
        ("geometric", 0.9, 1.1, ("truncate", "mask", "reject")),
        ("k3", None, 0.4, ("reject",)),
        ("k3_max", None, 1.5, ("reject",)),
    ],
)
def test_corrections(ratio, low, high, actions):
    pi, mu, _, mask = example(seed=2, shape=(9, 7))
    mask[3] = False
    unbounded = numpy_weights(pi, mu, mask, ratio, "mask", None, None)
    bounded = numpy_weights(pi, mu, mask, ratio, "mask", low, high)
    for action in actions:
        correction = Correction(ratio=ratio, action=action, low=low, high=high)
        weight, stats = corrections.weights(*tensors(pi, mu, mask), correction)
        expected = numpy_weights(pi, mu, mask, ratio, action, low, high)
        np.testing.assert_allclose(weight, expected, rtol=1e-5, err_msg=action)
        assert stats["corrected"] == (unbounded != bounded).sum() > 0
        assert stats["weight"].item() == pytest.approx(expected.sum(), rel=1e-5)


def test_ratios_that_overflow_are_bounded():
    """50 nats a token, a thousand tokens: the ratio of the sequence is no number any more."""
    mask = torch.ones(2, 1000, dtype=torch.bool)
    mu = torch.full((2, 1000), -50.0)
    mu[1] = 0.0
    pi = -50.0 - mu

    def weights(ratio, action, high):
        correction = Correction(ratio=ratio, action=action, high=high)
        return corrections.weights(pi, mu, mask, correction)[0]

    for ratio in ("token", "sequence", "geometric"):
        truncated = weights(ratio, "truncate", 2.0)
        assert truncated[0].tolist() == [2.0] * 1000
        assert (truncated[1] < 1e-20).all()
        assert weights(ratio, "mask", 2.0)[0].abs().max() == 0
        assert torch.isfinite(weights(ratio, "truncate", None)).all()
    for loss in (losses.ppo_clip, losses.gspo, losses.cispo):
        values, _ = loss(inputs(pi, mu, -torch.ones(2, 1000), mask))
        assert torch.isfinite(values).all()


def test_corrections_weigh_with_the_old_policy_and_policy_gradients_with_the_new():
    batch, logprobs = random_batch()
    correction = {"ratio": "sequence", "action": "truncate", "high": 2.0}
    for loss, numerator in (("ppo_clip", batch.pi_logprobs), ("policy_gradient", logprobs)):
        plain, corrected = algorithm(loss=loss), algorithm(loss=loss, correction=correction)
        prepared = plain.prepare(batch)
        given = (numerator, batch.mu_logprobs, batch.mask, Correction(**correction))
        expected = plain.token_losses(logprobs, prepared)[0] * corrections.weights(*given)[0]
        ours, stats = corrected.token_losses(logprobs, prepared)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        assert stats["corrected"] > 0
