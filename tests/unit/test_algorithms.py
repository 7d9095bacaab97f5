"""Advantages and losses against formulas written independently in NumPy, gradients by differences."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_fp16rl.algorithms import Algorithm, advantages, corrections, losses
from megatron_fp16rl.algorithms.losses import LossInputs
from megatron_fp16rl.data.batch import ScoredBatch
from megatron_fp16rl.recipe import Algorithm as Settings
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.algorithm import LOSSES, Correction

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


def test_overlong_responses_lose_up_to_one():
    lengths = torch.tensor([1, 60, 61, 80, 99, 100, 120])
    penalty = advantages.overlong_penalty(lengths, limit=100, buffer=40)
    np.testing.assert_allclose(penalty, [0, 0, -1 / 40, -0.5, -39 / 40, -1, -1], rtol=1e-6)


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
    found, stats = losses.LOSSES[loss](inputs(logprobs, old, advantages, mask, *bounds))
    expected = reference(new, old, advantages, mask, *bounds)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12)
    if loss == "policy_gradient":
        assert stats["clipped"] == 0
    else:
        assert 0 < stats["clipped"] < mask.sum()
    found.sum().backward()
    options = {"weight_of": new} if name == "cispo" else {}  # its weight has no gradient
    step = 1e-6
    for index in np.ndindex(new.shape):
        up, down = new.copy(), new.copy()
        up[index] += step
        down[index] -= step
        slope = (
            reference(up, old, advantages, mask, *bounds, **options).sum()
            - reference(down, old, advantages, mask, *bounds, **options).sum()
        ) / (2 * step)
        assert logprobs.grad[index].item() == pytest.approx(slope, abs=1e-6)


def test_ppo_counts_the_tokens_that_clipping_stops():
    new, old, advantages, mask = example()
    _, stats = losses.ppo_clip(inputs(new, old, advantages, mask, 0.2, 0.28))
    ratio = np.exp(new - old)
    outside = ((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8))
    assert stats["clipped"] == (outside & mask).sum()


OWN = """
import torch

def squared(inputs):
    ratio = torch.exp(inputs.logprobs - inputs.mu_logprobs)
    losses = -inputs.advantages * ratio + (ratio - 1) ** 2
    return losses, {"ratio": (ratio.detach() * inputs.mask).sum()}

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


def test_a_loss_of_the_users_own_and_its_gradient_by_finite_differences(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    algorithm = Algorithm(Settings(loss=f"{tmp_path}/own.py:squared"), 10)
    batch, logprobs = made_batch()
    batch, logprobs = algorithm.prepare(batch), logprobs.double().requires_grad_()
    found, stats = algorithm.token_losses(logprobs, batch)
    found.sum().backward()

    def reference(new):
        ratio = np.exp(new - batch.mu_logprobs.numpy())
        return np.where(batch.mask, -batch.advantages.numpy() * ratio + (ratio - 1) ** 2, 0.0)

    new, step = logprobs.detach().numpy(), 1e-6
    np.testing.assert_allclose(found.detach(), reference(new), rtol=1e-6)
    for index in np.ndindex(new.shape):
        change = np.zeros_like(new)
        change[index] = step
        slope = (reference(new + change) - reference(new - change)).sum() / (2 * step)
        assert logprobs.grad[index].item() == pytest.approx(slope, abs=1e-5)
    assert stats["ratio"] > 0


def test_the_loss_in_the_docs_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs/algorithms.md").read_text()
    (tmp_path / "my_losses.py").write_text(page.split("```python")[1].split("```")[0])
    algorithm = Algorithm(Settings(loss=f"{tmp_path}/my_losses.py:my_loss"), 10)
    batch, logprobs = made_batch()
    _, stats = algorithm.token_losses(logprobs.requires_grad_(), algorithm.prepare(batch))
    assert set(stats) == {"ratio"}


@pytest.mark.parametrize("function", ["alone", "summed", "detached", "numbers", "taken"])
def test_a_loss_that_returns_something_else_is_refused(tmp_path, function):
    (tmp_path / "own.py").write_text(OWN)
    algorithm = Algorithm(Settings(loss=f"{tmp_path}/own.py:{function}"), 10)
    batch, logprobs = made_batch()
    with pytest.raises(RecipeError, match=f"{function} must return the loss of each token"):
        algorithm.token_losses(logprobs.requires_grad_(), algorithm.prepare(batch))


def test_a_loss_that_cannot_be_imported_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    for loss, message in (
        (f"{tmp_path}/none.py:loss", "there is no file"),
        (f"{tmp_path}/own.py:loss", "has no function 'loss'; it has: squared, alone"),
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
    found = losses.kl_penalty(*tensors(new, reference, mask), estimator)
    np.testing.assert_allclose(found, np.where(mask, formula(reference - new), 0.0), atol=1e-12)


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
    ],
)
def test_corrections(ratio, action, low, high):
    if ratio == "k3" and action != "reject":
        pytest.skip("not a ratio to weigh with")
    pi, mu, _, mask = example(seed=2, shape=(9, 7))
    mask[3] = False
    correction = Correction.model_construct(ratio=ratio, action=action, low=low, high=high)
    found, stats = corrections.weights(*tensors(pi, mu, mask), correction)
    expected = numpy_weights(pi, mu, mask, ratio, action, low, high)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
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


def test_tokens_outside_the_mask_cannot_poison_the_loss():
    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1e4, -1.0]])  # would overflow exp
    mask = torch.tensor([[False, True]])
    found, _ = losses.ppo_clip(inputs(logprobs, old, torch.ones(1, 2), mask))
    found.sum().backward()
    assert found.tolist() == [[0.0, -1.0]]
    assert logprobs.grad.tolist() == [[0.0, -1.0]]
    nll = losses.negative_log_likelihood(logprobs, mask)
    assert nll.tolist() == [[0.0, 1.0]]


def made_batch(seed=3):
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
    batch, logprobs = made_batch()
    algorithm = Algorithm(Settings(aggregation=aggregation), max_tokens=10)
    batch = algorithm.prepare(batch)
    found = (algorithm.token_losses(logprobs, batch)[0].sum() / algorithm.normaliser(batch)).item()
    tokenwise, _ = losses.ppo_clip(
        inputs(logprobs, batch.pi_logprobs, batch.advantages, batch.mask)
    )
    assert found == pytest.approx(expected(tokenwise.numpy(), batch.mask.numpy()), rel=1e-5)


def test_corrections_weigh_with_the_old_policy_and_policy_gradients_with_the_new():
    batch, logprobs = made_batch()
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


def test_without_mismatch_every_correction_is_none():
    batch, logprobs = made_batch()
    batch = batch.replace(mu_logprobs=batch.pi_logprobs)
    plain = Algorithm(Settings(), 10)
    prepared = plain.prepare(batch)
    expected, _ = plain.token_losses(logprobs, prepared)
    for ratio, action in itertools.product(
        ("token", "sequence", "geometric"), ("truncate", "mask", "reject")
    ):
        settings = Settings(correction={"ratio": ratio, "action": action, "high": 2.0})
        found, _ = Algorithm(settings, 10).token_losses(logprobs, prepared)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_rollout_policy_can_be_the_old_one():
    batch, logprobs = made_batch()
    algorithm = Algorithm(Settings(old_policy="rollout"), 10)
    prepared = algorithm.prepare(batch)
    expected, _ = losses.ppo_clip(
        inputs(logprobs, batch.mu_logprobs, prepared.advantages, batch.mask)
    )
    torch.testing.assert_close(algorithm.token_losses(logprobs, prepared)[0], expected)


def test_kl_in_the_loss_and_in_the_reward():
    batch, logprobs = made_batch()
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
    batch, _ = made_batch()
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
