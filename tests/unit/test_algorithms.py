"""Advantages and losses against formulas written independently in NumPy, gradients by differences."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_fp16rl.algorithms import losses
from megatron_fp16rl.algorithms.advantages import ADVANTAGES
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.recipe import Algorithm as Settings
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.algorithm import LOSSES
from tests.unit import losses as references
from tests.unit.losses import algorithm, example, inputs, random_batch, slopes, tensors

REWARDS = np.array([1.0, 0.0, 0.0, 0.5, 2.0, 2.5, 1.0, 1.0])
GROUPS = np.array([7, 7, 3, 3, 3, 7, 9, 9])


def by_group(formula):
    result = np.zeros(len(REWARDS))
    for g in set(GROUPS):
        result[g == GROUPS] = formula(REWARDS[g == GROUPS])
    return result


def normalised(values):
    return (values - values.mean()) / (values.std(ddof=1) + 1e-6)


def centred(rewards):
    return rewards - rewards.mean()


def against_the_others(rewards):
    return np.array([r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", by_group(normalised)),
        ("dr_grpo", by_group(centred)),
        ("rloo", by_group(against_the_others)),
        ("reinforce", REWARDS),
        ("reinforce_pp", normalised(REWARDS)),
        ("reinforce_pp_baseline", normalised(by_group(centred))),
    ],
)
def test_advantages(name, expected):
    function = ADVANTAGES[name]
    ours = function(torch.tensor(REWARDS), torch.tensor(GROUPS), None)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
    if name != "reinforce":  # equal rewards, and a single sample, give no advantage
        assert function(torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1]), None).abs().max() == 0
        assert function(torch.tensor([3.0]), torch.tensor([0]), None).tolist() == [0.0]


CASES = {
    "ppo": ("ppo_clip", references.ppo, {"clip_low": 0.2, "clip_high": 0.2}),
    "ppo-dual": (
        "ppo_clip",
        references.ppo,
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5},
    ),
    "gspo": ("gspo", references.gspo, {"clip_low": 0.03, "clip_high": 0.04}),
    "cispo": ("cispo", references.cispo, {"clip_low": 0.2, "clip_high": 0.28}),
    "policy-gradient": ("policy_gradient", references.policy_gradient, {}),
    "dppo-tv": ("dppo_tv", references.dppo_tv, {"delta": 0.15}),
    "dppo-kl": ("dppo_kl", references.dppo_kl, {"delta": 0.05}),
    "drpo": ("drpo", references.drpo, {"delta": 0.15}),
}


def test_every_loss_of_a_recipe_is_tested():
    assert set(losses.LOSSES) == set(LOSSES) == {loss for loss, _, _ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_their_gradients_by_finite_differences(name):
    loss, reference, bounds = CASES[name]
    new, old, advantages, mask = example(seed=4)
    new, old = np.minimum(new, -0.01), np.minimum(old, -0.01)  # log-probs are not positive
    old[0, :2], mask[0, :2], new[0, :2] = -13.0, True, (-0.5, -3.0)  # ratios of 268,000 and 22,000
    logprobs = torch.tensor(new, requires_grad=True)
    values, stats = losses.LOSSES[loss](inputs(logprobs, old, advantages, mask, **bounds))
    expected = reference(new, old, advantages, mask, **bounds)
    np.testing.assert_allclose(values.detach(), expected, rtol=1e-12)
    values.sum().backward()
    slope = slopes(lambda x: reference(x, old, advantages, mask, **bounds, at=new), new)
    np.testing.assert_allclose(logprobs.grad, slope, rtol=1e-6, atol=1e-6)
    if loss == "cispo":  # no token loses its gradient
        ratio = np.exp(new - old)
        clipped = (ratio < 0.8) | (ratio > 1.28)
    else:
        clipped = slope * advantages >= 0  # it does not follow the advantage
    assert stats["clipped"] == (clipped & mask).sum()
    assert (0 < stats["clipped"] < mask.sum()) == bool(bounds)


def test_a_token_that_was_certain_does_not_make_dppo_infinite():
    new = torch.tensor([[0.0, 0.0, -30.0, -1e-9]], requires_grad=True)
    old, mask = torch.tensor([[0.0, -50.0, 0.0, 0.0]]), torch.ones(1, 4).bool()
    for loss in ("dppo_tv", "dppo_kl", "drpo"):
        for sign in (1.0, -1.0):
            given = inputs(new, old, torch.full((1, 4), sign), mask, delta=0.05)
            values, _ = losses.LOSSES[loss](given)
            (gradient,) = torch.autograd.grad(values.sum(), new)
            assert torch.isfinite(values).all(), loss
            assert torch.isfinite(gradient).all(), loss


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
    own = algorithm(loss=f"{tmp_path}/my_losses.py:my_loss")
    batch, logprobs = random_batch()
    batch, logprobs = own.prepare(batch), logprobs.double().requires_grad_()
    token_losses, statistics = own.token_losses(logprobs, batch)
    token_losses.sum().backward()

    def reference(new):
        ratio = np.exp(new - batch.pi_logprobs.numpy())
        losses = -batch.advantages.numpy() * ratio + 0.1 * (ratio - 1) ** 2
        return np.where(batch.mask, losses, 0.0)

    new = logprobs.detach().numpy()
    np.testing.assert_allclose(token_losses.detach(), reference(new), rtol=1e-6)
    np.testing.assert_allclose(logprobs.grad, slopes(reference, new), atol=1e-5)
    assert set(statistics) == {"ratio"}


def test_a_loss_that_cannot_be_imported_or_returns_something_else_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    for loss, message in (
        ("none.py:loss", "there is no file"),
        ("own.py:loss", "has no function 'loss'; it has: alone, summed"),
        ("broken.py:loss", "ModuleNotFoundError: No module named 'nothing_of"),
    ):
        with pytest.raises(RecipeError, match=f"algorithm.loss=.*{message}"):
            algorithm(loss=f"{tmp_path}/{loss}")
    batch, logprobs = random_batch()
    for function in ("alone", "summed", "detached", "numbers", "taken"):
        own = algorithm(loss=f"{tmp_path}/own.py:{function}")
        with pytest.raises(RecipeError, match=f"{function} must return the loss of each token"):
            own.token_losses(logprobs.requires_grad_(), own.prepare(batch))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("token_mean", lambda losses, mask: losses[mask].mean()),
        ("sequence_mean", lambda losses, mask: (losses.sum(1) / mask.sum(1)).mean()),
        ("max_length", lambda losses, mask: losses[mask].sum() / (6 * 10)),
    ],
)
def test_aggregations(name, formula):
    batch, logprobs = random_batch()
    aggregated = algorithm(aggregation=name)
    batch = aggregated.prepare(batch)
    loss = aggregated.token_losses(logprobs, batch)[0].sum() / aggregated.normaliser(batch)
    given = inputs(logprobs, batch.pi_logprobs, batch.advantages, batch.mask)
    expected = formula(losses.ppo_clip(given)[0].numpy(), batch.mask.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_rollout_policy_can_be_the_old_one():
    batch, logprobs = random_batch()
    on_mu = algorithm(old_policy="rollout")
    prepared = on_mu.prepare(batch)
    given = inputs(logprobs, batch.mu_logprobs, prepared.advantages, batch.mask)
    torch.testing.assert_close(on_mu.token_losses(logprobs, prepared)[0], losses.ppo_clip(given)[0])


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [("k1", lambda d: -d), ("k2", lambda d: d**2 / 2), ("k3", lambda d: np.exp(d) - 1 - d)],
)
def test_kl_penalty(estimator, formula):
    new, reference, _, mask = example()
    logprobs = torch.tensor(new, requires_grad=True)
    penalty = losses.kl_penalty(logprobs, *tensors(reference, mask), estimator)
    penalty.sum().backward()

    def expected(new):
        return np.where(mask, formula(reference - new), 0.0)

    np.testing.assert_allclose(penalty.detach(), expected(new), atol=1e-12)
    np.testing.assert_allclose(logprobs.grad, slopes(expected, new), atol=1e-6)


def test_kl_in_the_loss_and_in_the_reward():
    """By default with the estimators whose gradient, or whose mean, is the divergence's."""
    batch, logprobs = random_batch()
    plain = algorithm(advantage="reinforce")
    prepared = plain.prepare(batch)
    in_loss = algorithm(advantage="reinforce", kl={"coefficient": 0.3})
    d = (batch.reference_logprobs - logprobs) * batch.mask
    expected = plain.token_losses(logprobs, prepared)[0] + 0.3 * d**2 / 2
    torch.testing.assert_close(in_loss.token_losses(logprobs, prepared)[0], expected)
    in_reward = algorithm(advantage="reinforce", kl={"coefficient": 0.3, "into": "reward"})
    d = ((batch.reference_logprobs - batch.pi_logprobs) * batch.mask).sum(1)
    expected = (batch.rewards + 0.3 * d)[:, None] * batch.mask
    torch.testing.assert_close(in_reward.prepare(batch).advantages, expected)


def test_a_kl_penalty_can_be_anchored_at_the_policy_that_sampled():
    """prime-rl adds 1e-3 of the squared log-ratio to mu: twice k2."""
    batch, logprobs = random_batch()
    settings = {"old_policy": "rollout", "loss": "dppo_tv"}
    held = algorithm(**settings, kl={"coefficient": 2e-3, "anchor": "rollout"})
    assert not held.settings.keeps_reference
    unscored = Batch(**{f.name: getattr(batch, f.name) for f in fields(Batch)}).scored(None)
    prepared = held.prepare(unscored)
    expected = algorithm(**settings).token_losses(logprobs, prepared)[0]
    expected = expected + 1e-3 * ((logprobs - batch.mu_logprobs) * batch.mask) ** 2
    torch.testing.assert_close(held.token_losses(logprobs, prepared)[0], expected)


def test_overlong_shaping_reaches_the_advantages():
    """By all that follows the prompt, of which an environment may have said a part."""
    batch, _ = random_batch()
    batch.mask[:2] = torch.zeros_like(batch.mask[:2])
    batch.mask[0, [1, 3]] = batch.mask[1, [1, 4]] = True
    shaped = algorithm(advantage="reinforce", overlong={"buffer": 8, "penalty": 0.5})
    follow = np.array([np.ptp(np.flatnonzero(row)) + 1 for row in batch.mask.numpy()])
    assert follow[:2].tolist() == [3, 4]
    lost = 0.5 * np.clip((follow - 2) / 8, 0, 1)
    expected = (batch.rewards.numpy() - lost)[:, None] * batch.mask.numpy()
    np.testing.assert_allclose(shaped.prepare(batch).advantages, expected)


def corrected(ratio, action, **bounds):
    return {"correction": {"ratio": ratio, "action": action, **bounds}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (corrected("k3", "mask", high=1.0), "use it with .*reject"),
        (corrected("k3_max", "mask", high=1.0), "use it with .*reject"),
        (corrected("token", "reject"), "needs a bound"),
        (corrected("token", "mask", low=3, high=2), "low=3.0 is above high=2.0"),
        (
            {"old_policy": "rollout", **corrected("token", "truncate", high=2)},
            "would count it twice",
        ),
        ({"loss": "gspo", "dual_clip": 3.0}, "dual_clip goes with loss=ppo_clip"),
        ({"loss": "dppo_kl"}, "anchored at the policy that sampled: set old_policy: rollout"),
        ({"delta": 0.1}, "delta goes with loss=dppo_tv, dppo_kl, drpo, not with ppo_clip"),
        (
            {"kl": {"coefficient": 0.1, "anchor": "rollout", "into": "reward"}},
            "anchor=rollout: in the reward",
        ),
        ({"kl": {"coefficient": 0.1, "estimator": "k1"}}, "its expected gradient is zero"),
        ({"loss": "grpo"}, "there is no loss 'grpo': take one of ppo_clip"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Settings(**settings)
