"""The losses as their papers have them, in NumPy, and gradients by differences."""

from dataclasses import replace

import numpy as np
import torch

from megatron_fp16rl.algorithms import Algorithm
from megatron_fp16rl.algorithms.losses import LossInputs
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.recipe import Algorithm as Settings


def example(seed=0, shape=(5, 7)):
    generator = np.random.default_rng(seed)
    new, old = generator.normal(-1, 0.6, (2, *shape))
    advantages = generator.normal(size=(shape[0], 1)) * np.ones(shape)
    mask = generator.random(shape) < 0.7
    return new, old, advantages, mask


def tensors(*arrays):
    return [torch.tensor(x) for x in arrays]


def inputs(new, old, advantages, mask, **bounds):
    new, old, advantages, mask = (torch.as_tensor(x) for x in (new, old, advantages, mask))
    return LossInputs(new, old, old, advantages, mask, **bounds)


def algorithm(**settings):
    """Of responses of ten tokens at most."""
    return Algorithm(Settings(**settings), max_tokens=10)


def random_batch(seed=3):
    """Six responses of two prompts, all fields random; and log-probs of the policy that learns."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]] * 2, dtype=torch.bool)

    def logprobs():
        return (-1 + 0.5 * torch.randn(mask.shape, generator=generator)) * mask

    sampled = replace(
        Batch.from_token_ids([[0] * 5, [0] * 3, [0] * 5] * 2),
        mask=mask,
        mu_logprobs=logprobs(),
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.0]),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    return sampled.scored(logprobs(), logprobs()), logprobs()


def slopes(function, new, step=1e-6):
    """The gradient of the sum of a function, by differences."""
    result = np.zeros_like(new)
    for index in np.ndindex(new.shape):
        change = np.zeros_like(new)
        change[index] = step
        result[index] = (function(new + change) - function(new - change)).sum() / (2 * step)
    return result


# Each reference takes log pi and log pi_old, advantages, a mask, and the bounds that it needs. at: log pi
# in weights without a gradient, which the value that is reported has and the gradient of another does not.


def ppo(new, old, advantages, mask, clip_low, clip_high, dual_clip=None, at=None):
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = np.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        capped = np.maximum(surrogate, dual_clip * advantages)
        surrogate = np.where(advantages < 0, capped, surrogate)
    return np.where(mask, -surrogate, 0.0)


def gspo(new, old, advantages, mask, clip_low, clip_high, at=None):
    ratio = np.ones_like(new)
    for row in range(len(new)):
        kept = mask[row]
        ratio[row] = np.exp((new - old)[row, kept].mean()) if kept.any() else 1.0
    return ppo(np.log(ratio), np.zeros_like(new), advantages, mask, clip_low, clip_high)


def cispo(new, old, advantages, mask, clip_low, clip_high, at=None):
    ratio = np.exp((new if at is None else at) - old)
    return np.where(mask, -advantages * np.clip(ratio, 1 - clip_low, 1 + clip_high) * new, 0.0)


def policy_gradient(new, old, advantages, mask, at=None):
    return np.where(mask, -advantages * new, 0.0)


def dppo(new, old, advantages, mask, delta, divergence, at=None):
    """-A r, one token after the other; `at` decides who is stopped, and of weights over 10,000."""
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


def dppo_tv(*arguments, **options):
    return dppo(*arguments, divergence=lambda pi, mu: abs(pi - mu), **options)


def dppo_kl(*arguments, **options):
    def divergence(pi, mu):
        return mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))

    return dppo(*arguments, divergence=divergence, **options)


def drpo(new, old, advantages, mask, delta, at=None):
    pi, mu = np.exp(new), np.exp(old)
    penalty = np.abs(advantages) * (pi - mu) ** 2 / (2 * delta * mu)
    return np.where(mask, -advantages * pi / mu + penalty, 0.0)
