"""Advantages and losses against formulas written independently in NumPy, gradients by differences."""

import numpy as np
import pytest
import torch

from megatron_fp16rl.algorithms import Algorithm
from megatron_fp16rl.algorithms.advantages import grpo
from megatron_fp16rl.algorithms.losses import negative_log_likelihood, ppo_clip
from megatron_fp16rl.batch import Batch
from megatron_fp16rl.recipe import Algorithm as Settings


def test_grpo_is_the_standard_score_within_a_group():
    rewards = np.array([1.0, 0.0, 0.0, 0.5, 2.0, 2.5, 1.0, 1.0])
    groups = np.array([7, 7, 3, 3, 3, 7, 9, 9])
    expected = np.zeros(8)
    for g in set(groups):
        r = rewards[groups == g]
        expected[groups == g] = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
    ours = grpo(torch.tensor(rewards), torch.tensor(groups))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_grpo_learns_nothing_from_equal_rewards():
    assert grpo(torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])).abs().max() == 0
    assert torch.isfinite(grpo(torch.tensor([3.0]), torch.tensor([0]))).all()


def example(seed=0, shape=(5, 7)):
    generator = np.random.default_rng(seed)
    new, old = generator.normal(-1, 0.6, (2, *shape))
    advantages = generator.normal(size=(shape[0], 1)) * np.ones(shape)
    mask = generator.random(shape) < 0.7
    return new, old, advantages, mask


def numpy_ppo(new, old, advantages, mask, low, high):
    ratio = np.exp(new - old)
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    return np.where(mask, -surrogate, 0.0)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_ppo_clip(low, high):
    new, old, advantages, mask = example()
    tensors = [torch.tensor(x) for x in (new, old, advantages, mask)]
    losses, stats = ppo_clip(*tensors, low, high)
    np.testing.assert_allclose(losses, numpy_ppo(new, old, advantages, mask, low, high), rtol=1e-12)
    ratio = np.exp(new - old)
    outside = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    assert stats["clipped"] == (outside & mask).sum() > 0


def test_ppo_clip_gradient_by_finite_differences():
    new, old, advantages, mask = example(seed=4)
    logprobs = torch.tensor(new, requires_grad=True)
    rest = [torch.tensor(x) for x in (old, advantages, mask)]
    ppo_clip(logprobs, *rest, 0.2, 0.28)[0].sum().backward()
    step = 1e-6
    for index in np.ndindex(new.shape):
        up, down = new.copy(), new.copy()
        up[index] += step
        down[index] -= step
        slope = (
            numpy_ppo(up, old, advantages, mask, 0.2, 0.28).sum()
            - numpy_ppo(down, old, advantages, mask, 0.2, 0.28).sum()
        ) / (2 * step)
        assert logprobs.grad[index].item() == pytest.approx(slope, abs=1e-6)


def test_tokens_outside_the_mask_cannot_poison_the_loss():
    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1e4, -1.0]])  # would overflow exp
    mask = torch.tensor([[False, True]])
    losses, _ = ppo_clip(logprobs, old, torch.ones(1, 2), mask, 0.2, 0.2)
    losses.sum().backward()
    assert losses.tolist() == [[0.0, -1.0]]
    assert logprobs.grad.tolist() == [[0.0, -1.0]]
    nll = negative_log_likelihood(logprobs, mask)
    assert nll.tolist() == [[0.0, 1.0]]


def test_prepare_gives_every_response_token_its_advantage():
    mask = torch.tensor([[False, True, True], [False, True, False]])
    batch = Batch(
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        lengths=torch.tensor([3, 2]),
        mask=mask,
        mu_logprobs=torch.zeros(2, 3),
        rewards=torch.tensor([1.0, 0.0]),
        groups=torch.tensor([0, 0]),
        truncated=torch.zeros(2, dtype=torch.bool),
    )
    algorithm = Algorithm(Settings())
    advantage = 0.5 / (0.5**0.5 + 1e-6)
    expected = [[0, advantage, advantage], [0, -advantage, 0]]
    assert algorithm.prepare(batch).advantages.numpy() == pytest.approx(np.array(expected))
    assert algorithm.normaliser(batch) == 3
