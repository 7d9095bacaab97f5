"""The losses as their papers have them, in NumPy, and gradients by differences."""

import numpy as np
import torch

from megatron_fp16rl.algorithms.losses import LossInputs


def example(seed=0, shape=(5, 7)):
    generator = np.random.default_rng(seed)
    new, old = generator.normal(-1, 0.6, (2, *shape))
    advantages = generator.normal(size=(shape[0], 1)) * np.ones(shape)
    mask = generator.random(shape) < 0.7
    return new, old, advantages, mask


def tensors(*arrays):
    return [torch.tensor(x) for x in arrays]


def inputs(new, old, advantages, mask, low=0.2, high=0.2, dual=None, delta=None):
    new, old, advantages, mask = (torch.as_tensor(x) for x in (new, old, advantages, mask))
    return LossInputs(new, old, old, advantages, mask, low, high, dual, delta)


def slopes(function, new, step=1e-6):
    """The gradient of the sum of a function, by differences."""
    result = np.zeros_like(new)
    for index in np.ndindex(new.shape):
        change = np.zeros_like(new)
        change[index] = step
        result[index] = (function(new + change) - function(new - change)).sum() / (2 * step)
    return result


def numpy_ppo(new, old, advantages, mask, low, high, dual=None):
    ratio = np.exp(new - old)
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual is not None:
        surrogate = np.where(advantages < 0, np.maximum(surrogate, dual * advantages), surrogate)
    return np.where(mask, -surrogate, 0.0)


def numpy_gspo(new, old, advantages, mask, low, high):
    ratio = np.ones_like(new)
    for row in range(len(new)):
        kept = mask[row]
        ratio[row] = np.exp((new - old)[row, kept].mean()) if kept.any() else 1.0
    return numpy_ppo(np.log(ratio), np.zeros_like(new), advantages, mask, low, high)


def numpy_cispo(new, old, advantages, mask, low, high, weight_of=None):
    ratio = np.exp((new if weight_of is None else weight_of) - old)
    return np.where(mask, -advantages * np.clip(ratio, 1 - low, 1 + high) * new, 0.0)


def numpy_policy_gradient(new, old, advantages, mask):
    return np.where(mask, -advantages * new, 0.0)


def numpy_dppo(new, old, advantages, mask, low, high, dual, delta, divergence, at=None):
    """-A r, one token after the other; those that are stopped, and weights over 10,000, as at `at` (of both)."""
    result = np.zeros_like(new)
    for index in zip(*np.nonzero(mask), strict=True):
        advantage = advantages[index]
        pi, mu = np.exp((new if at is None else at)[index]), np.exp(old[index])
        away = pi > mu if advantage > 0 else pi < mu
        if away and divergence(pi, mu) > delta:
            continue
        if at is None:  # the value that is reported has log pi in place of r
            result[index] = -advantage * min(pi / mu, 1e4) * new[index]
        elif pi / mu > 1e4:
            result[index] = -advantage * 1e4 * new[index]
        else:
            result[index] = -advantage * np.exp(new[index]) / mu
    return result


def numpy_dppo_tv(*arguments, **options):
    return numpy_dppo(*arguments, divergence=lambda pi, mu: abs(pi - mu), **options)


def numpy_dppo_kl(*arguments, **options):
    def divergence(pi, mu):
        return mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))

    return numpy_dppo(*arguments, divergence=divergence, **options)


def numpy_drpo(new, old, advantages, mask, low, high, dual, delta):
    pi, mu = np.exp(new), np.exp(old)
    penalty = np.abs(advantages) * (pi - mu) ** 2 / (2 * delta * mu)
    return np.where(mask, -advantages * pi / mu + penalty, 0.0)
