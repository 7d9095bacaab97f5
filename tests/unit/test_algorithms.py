"""Advantages and losses against formulas written independently in NumPy, gradients by differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_fp16rl.algorithms import Algorithm, advantages, losses
from megatron_fp16rl.algorithms.losses import LossInputs
from megatron_fp16rl.data.batch import ScoredBatch
from megatron_fp16rl.recipe import Algorithm as Settings
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.algorithm import LOSSES

REWARDS = np.array([1.0, 0.0, 0.0, 0.5, 2.0, 2.5, 1.0, 1.0])
GROUPS = np.array([7, 7, 3, 3, 3, 7, 9, 9])


def by_group(formula):
    result = np.zeros(len(REWARDS))
    for g in set(GROUPS):
        result[g == GROUPS] = formula(REWARDS[g == GROUPS])
    return result


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (advantages.grpo, lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6)),
        (advantages.dr_grpo, lambda r: r - r.mean()),
        (
            advantages.rloo,
            lambda r: np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))]),
        ),
        (advantages.reinforce, lambda r: r),
    ],
    ids=["grpo", "dr_grpo", "rloo", "reinforce"],
)
def test_advantages_within_groups(function, formula):
    ours = function(torch.tensor(REWARDS), torch.tensor(GROUPS))
    np.testing.assert_allclose(ours.numpy(), by_group(formula), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [advantages.grpo, advantages.dr_grpo, advantages.rloo])
def test_equal_rewards_or_a_single_sample_give_no_advantage(function):
    assert function(torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])).abs().max() == 0
    assert function(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0.0]


def test_reinforce_pp_normalises_over_the_batch():
    def normalised(values):
        return (values - values.mean()) / (values.std(ddof=1) + 1e-6)

    plain, baseline = (
        advantages.ADVANTAGES[name](torch.tensor(REWARDS), torch.tensor(GROUPS), None)
        for name in ("reinforce_pp", "reinforce_pp_baseline")
    )
    np.testing.assert_allclose(plain, normalised(REWARDS))
    np.testing.assert_allclose(baseline, normalised(by_group(lambda r: r - r.mean())), atol=1e-12)
    assert advantages.normalised(torch.ones(3), None).tolist() == [0.0, 0.0, 0.0]


def example(seed=0, shape=(5, 7)):
    generator = np.random.default_rng(seed)
    new, old = generator.normal(-1, 0.6, (2, *shape))
    advantages = generator.normal(size=(shape[0], 1)) * np.ones(shape)
    mask = generator.random(shape) < 0.7
    return new, old, advantages, mask


def tensors(*arrays):
    return [torch.tensor(x) for x in arrays]


def inputs(new, old, advantages, mask, low=0.2, high=0.2, dual=None):
    new, old, advantages, mask = (torch.as_tensor(x) for x in (new, old, advantages, mask))
    return LossInputs(new, old, old, advantages, mask, low, high, dual)


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


CASES = {
    "ppo": ("ppo_clip", numpy_ppo, (0.2, 0.2)),
    "ppo-asymmetric": ("ppo_clip", numpy_ppo, (0.2, 0.28)),
    "ppo-dual": ("ppo_clip", numpy_ppo, (0.2, 0.28, 1.5)),
    "gspo": ("gspo", numpy_gspo, (0.03, 0.04)),
    "cispo": ("cispo", numpy_cispo, (0.2, 0.28)),
    "policy-gradient": ("policy_gradient", numpy_policy_gradient, ()),
}


def test_every_loss_of_a_recipe_is_tested():
    assert set(losses.LOSSES) == set(LOSSES) == {loss for loss, _, _ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_their_gradients_by_finite_differences(name):
    loss, reference, bounds = CASES[name]
    new, old, advantages, mask = example(seed=4)
    logprobs = torch.tensor(new, requires_grad=True)
    values, stats = losses.LOSSES[loss](inputs(logprobs, old, advantages, mask, *bounds))
    expected = reference(new, old, advantages, mask, *bounds)
    np.testing.assert_allclose(values.detach(), expected, rtol=1e-12)
    if loss == "policy_gradient":
        assert stats["clipped"] == 0
    else:
        assert 0 < stats["clipped"] < mask.sum()
    values.sum().backward()
    options = {"weight_of": new} if name == "cispo" else {}  # its weight has no gradient
    slope = slopes(lambda x: reference(x, old, advantages, mask, *bounds, **options), new)
    np.testing.assert_allclose(logprobs.grad, slope, atol=1e-6)


def test_ppo_counts_the_tokens_that_clipping_stops():
    new, old, advantages, mask = example()
    _, stats = losses.ppo_clip(inputs(new, old, advantages, mask, 0.2, 0.28))
    ratio = np.exp(new - old)
    outside = ((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8))
    assert stats["clipped"] == (outside & mask).sum()


OWN = """
def alone(inputs):
    return -inputs.advantages * inputs.logprobs

def summed(inputs):
    return (inputs.advantages * inputs.logprobs).sum(), {}

def detached(inputs):
    return inputs.logprobs.detach(), {}

def numbers(inputs):
    return inputs.logprobs, {"ratio": 1.0}

def taken(inputs):
    return inputs.logprobs, {"tokens": inputs.logprobs.sum()}
"""


def test_the_loss_in_the_docs_and_its_gradient_by_finite_differences(tmp_path):
    page = (Path(__file__).parents[2] / "docs/algorithms.md").read_text()
    (tmp_path / "my_losses.py").write_text(page.split("```python")[1].split("```")[0])
    algorithm = Algorithm(Settings(loss=f"{tmp_path}/my_losses.py:my_loss"), 10)
    batch, logprobs = random_batch()
    batch, logprobs = algorithm.prepare(batch), logprobs.double().requires_grad_()
    token_losses, statistics = algorithm.token_losses(logprobs, batch)
    token_losses.sum().backward()

    def reference(new):
        ratio = np.exp(new - batch.pi_logprobs.numpy())
        losses = -batch.advantages.numpy() * ratio + 0.1 * (ratio - 1) ** 2
        return np.where(batch.mask, losses, 0.0)

    new = logprobs.detach().numpy()
    np.testing.assert_allclose(token_losses.detach(), reference(new), rtol=1e-6)
    np.testing.assert_allclose(logprobs.grad, slopes(reference, new), atol=1e-5)
    assert set(statistics) == {"ratio"}


@pytest.mark.parametrize("function", ["alone", "summed", "detached", "numbers", "taken"])
def test_a_loss_that_returns_something_else_is_refused(tmp_path, function):
    (tmp_path / "own.py").write_text(OWN)
    algorithm = Algorithm(Settings(loss=f"{tmp_path}/own.py:{function}"), 10)
    batch, logprobs = random_batch()
    with pytest.raises(RecipeError, match=f"{function} must return the loss of each token"):
        algorithm.token_losses(logprobs.requires_grad_(), algorithm.prepare(batch))


def test_a_loss_that_cannot_be_imported_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    for loss, message in (
        (f"{tmp_path}/none.py:loss", "there is no file"),
        (f"{tmp_path}/own.py:loss", "has no function 'loss'; it has: alone, summed"),
        (f"{tmp_path}/broken.py:loss", "ModuleNotFoundError: No module named 'nothing_of"),
    ):
        with pytest.raises(RecipeError, match=f"algorithm.loss=.*{message}"):
            Algorithm(Settings(loss=loss), 10)


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda d: -d),
        ("k2", lambda d: d**2 / 2),
        ("k3", lambda d: np.exp(d) - 1 - d),
    ],
)
def test_kl_penalty(estimator, formula):
    new, reference, _, mask = example()
    penalty = losses.kl_penalty(*tensors(new, reference, mask), estimator)
    np.testing.assert_allclose(penalty, np.where(mask, formula(reference - new), 0.0), atol=1e-12)


def test_tokens_outside_the_mask_cannot_poison_the_loss():
    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1e4, -1.0]])  # would overflow exp
    mask = torch.tensor([[False, True]])
    values, _ = losses.ppo_clip(inputs(logprobs, old, torch.ones(1, 2), mask))
    values.sum().backward()
    assert values.tolist() == [[0.0, -1.0]]
    assert logprobs.grad.tolist() == [[0.0, -1.0]]
    nll = losses.negative_log_likelihood(logprobs, mask)
    assert nll.tolist() == [[0.0, 1.0]]


def random_batch(seed=3):
    """Six responses of two prompts, all fields random."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]] * 2, dtype=torch.bool)
    shape = mask.shape

    def logprobs():
        return (-1 + 0.5 * torch.randn(shape, generator=generator)) * mask

    return ScoredBatch(
        tokens=torch.zeros(shape, dtype=torch.int64),
        lengths=torch.tensor([5, 3, 5] * 2),
        mask=mask,
        mu_logprobs=logprobs(),
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.0]),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
        truncated=torch.zeros(6, dtype=torch.bool),
        versions=torch.zeros(shape, dtype=torch.int32),
        pi_logprobs=logprobs(),
        reference_logprobs=logprobs(),
    ), logprobs()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", lambda losses, mask: losses[mask].mean()),
        (
            "sequence_mean",
            lambda losses, mask: np.mean(
                [row[kept].mean() for row, kept in zip(losses, mask, strict=True)]
            ),
        ),
        ("max_length", lambda losses, mask: losses[mask].sum() / (6 * 10)),
    ],
)
def test_aggregations(aggregation, expected):
    batch, logprobs = random_batch()
    algorithm = Algorithm(Settings(aggregation=aggregation), max_tokens=10)
    batch = algorithm.prepare(batch)
    loss = (algorithm.token_losses(logprobs, batch)[0].sum() / algorithm.normaliser(batch)).item()
    tokenwise, _ = losses.ppo_clip(
        inputs(logprobs, batch.pi_logprobs, batch.advantages, batch.mask)
    )
    assert loss == pytest.approx(expected(tokenwise.numpy(), batch.mask.numpy()), rel=1e-5)


def test_the_rollout_policy_can_be_the_old_one():
    batch, logprobs = random_batch()
    algorithm = Algorithm(Settings(old_policy="rollout"), 10)
    prepared = algorithm.prepare(batch)
    expected, _ = losses.ppo_clip(
        inputs(logprobs, batch.mu_logprobs, prepared.advantages, batch.mask)
    )
    torch.testing.assert_close(algorithm.token_losses(logprobs, prepared)[0], expected)


def test_kl_in_the_loss_and_in_the_reward():
    batch, logprobs = random_batch()
    plain = Algorithm(Settings(advantage="reinforce"), 10)
    prepared = plain.prepare(batch)
    in_loss = Algorithm(
        Settings(advantage="reinforce", kl={"coefficient": 0.3, "estimator": "k2"}), 10
    )
    d = (batch.reference_logprobs - logprobs) * batch.mask
    expected = plain.token_losses(logprobs, prepared)[0] + 0.3 * d**2 / 2
    torch.testing.assert_close(in_loss.token_losses(logprobs, prepared)[0], expected)
    kl = {"coefficient": 0.3, "estimator": "k1", "into": "reward"}
    in_reward = Algorithm(Settings(advantage="reinforce", kl=kl), 10).prepare(batch)
    d = ((batch.reference_logprobs - batch.pi_logprobs) * batch.mask).sum(1)
    expected = (batch.rewards + 0.3 * d)[:, None] * batch.mask
    torch.testing.assert_close(in_reward.advantages, expected)


def test_overlong_shaping_reaches_the_advantages():
    batch, _ = random_batch()
    settings = Settings(advantage="reinforce", overlong={"buffer": 2, "penalty": 0.5})
    prepared = Algorithm(settings, max_tokens=4).prepare(batch)
    lost = 0.5 * np.clip((batch.mask.sum(1).numpy() - 2) / 2, 0, 1)
    expected = (batch.rewards.numpy() - lost)[:, None] * batch.mask.numpy()
    np.testing.assert_allclose(prepared.advantages, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correction": {"ratio": "k3", "action": "mask", "high": 1.0}}, "use it with .*reject"),
        ({"correction": {"ratio": "token", "action": "reject"}}, "needs a bound"),
        (
            {"correction": {"ratio": "token", "action": "mask", "low": 3, "high": 2}},
            "low=3.0 is above high=2.0",
        ),
        ({"loss": "gspo", "dual_clip": 3.0}, "dual_clip goes with loss=ppo_clip"),
        ({"loss": "grpo"}, "there is no loss 'grpo': take one of ppo_clip"),
        (
            {
                "old_policy": "rollout",
                "correction": {"ratio": "token", "action": "truncate", "high": 2},
            },
            "would count it twice",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Settings(**settings)
