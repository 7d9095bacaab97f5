"""Advantages and losses against formulas written independently in NumPy, gradients by differences."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_fp16rl.algorithms import Algorithm, advantages, losses
from megatron_fp16rl.data.batch import Batch, ScoredBatch
from megatron_fp16rl.recipe import Algorithm as Settings
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.algorithm import LOSSES
from tests.unit.losses import (
    example,
    inputs,
    numpy_cispo,
    numpy_dppo_kl,
    numpy_dppo_tv,
    numpy_drpo,
    numpy_gspo,
    numpy_policy_gradient,
    numpy_ppo,
    slopes,
    tensors,
)

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


CASES = {
    "ppo": ("ppo_clip", numpy_ppo, (0.2, 0.2)),
    "ppo-asymmetric": ("ppo_clip", numpy_ppo, (0.2, 0.28)),
    "ppo-dual": ("ppo_clip", numpy_ppo, (0.2, 0.28, 1.5)),
    "gspo": ("gspo", numpy_gspo, (0.03, 0.04)),
    "cispo": ("cispo", numpy_cispo, (0.2, 0.28)),
    "policy-gradient": ("policy_gradient", numpy_policy_gradient, ()),
    "dppo-tv": ("dppo_tv", numpy_dppo_tv, (0.2, 0.2, None, 0.15)),
    "dppo-kl": ("dppo_kl", numpy_dppo_kl, (0.2, 0.2, None, 0.05)),
    "drpo": ("drpo", numpy_drpo, (0.2, 0.2, None, 0.15)),
}
# The reported value of these losses is not what they differentiate: their weights have no gradient.
DETACHED = {"cispo": "weight_of", "dppo-tv": "at", "dppo-kl": "at"}


def test_every_loss_of_a_recipe_is_tested():
    assert set(losses.LOSSES) == set(LOSSES) == {loss for loss, _, _ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_their_gradients_by_finite_differences(name):
    loss, reference, bounds = CASES[name]
    new, old, advantages, mask = example(seed=4)
    new, old = np.minimum(new, -0.01), np.minimum(old, -0.01)  # log-probs are not positive
    old[0, :2], mask[0, :2], new[0, :2] = -13.0, True, (-0.5, -3.0)  # ratios of 268,000 and 22,000
    logprobs = torch.tensor(new, requires_grad=True)
    values, stats = losses.LOSSES[loss](inputs(logprobs, old, advantages, mask, *bounds))
    expected = reference(new, old, advantages, mask, *bounds)
    np.testing.assert_allclose(values.detach(), expected, rtol=1e-12)
    if not bounds:
        assert stats["clipped"] == 0
    else:
        assert 0 < stats["clipped"] < mask.sum()
    values.sum().backward()
    options = {DETACHED[name]: new} if name in DETACHED else {}
    slope = slopes(lambda x: reference(x, old, advantages, mask, *bounds, **options), new)
    np.testing.assert_allclose(logprobs.grad, slope, rtol=1e-6, atol=1e-6)


def test_dppo_and_drpo_stop_where_the_probability_has_moved_by_delta():
    """In DRPO's gradient A r has the weight 1 - sign(A) (pi - mu) / delta: table 1 of its paper."""
    mu, delta = 0.4, 0.15
    pi = np.array([[0.2, 0.26, 0.4, 0.54, 0.56, 0.9]] * 2)
    advantages = np.repeat([[1.0], [-1.0]], 6, axis=1)
    mask, old = np.ones_like(pi, dtype=bool), np.full_like(pi, np.log(mu))

    def weights(loss):
        logprobs = torch.tensor(np.log(pi), requires_grad=True)
        losses.LOSSES[loss](inputs(logprobs, old, advantages, mask, delta=delta))[
            0
        ].sum().backward()
        return -logprobs.grad.numpy() / (advantages * pi / mu)

    assert weights("dppo_tv").round(9).tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    np.testing.assert_allclose(weights("drpo"), 1 - advantages * (pi - mu) / delta, atol=1e-12)


def test_a_token_that_was_certain_does_not_make_dppo_infinite():
    new = torch.tensor([[0.0, 0.0, -30.0, -1e-9]], requires_grad=True)
    old = torch.tensor([[0.0, -50.0, 0.0, 0.0]])
    for loss in ("dppo_tv", "dppo_kl", "drpo"):
        for sign in (1.0, -1.0):
            values, _ = losses.LOSSES[loss](
                inputs(new, old, torch.full((1, 4), sign), torch.ones(1, 4).bool(), delta=0.05)
            )
            (gradient,) = torch.autograd.grad(values.sum(), new)
            assert torch.isfinite(values).all()
            assert torch.isfinite(gradient).all()


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


def test_of_the_kl_estimators_in_a_loss_only_k2_has_the_gradient_of_the_divergence():
    """Expected gradients over all tokens of a small vocabulary: nothing is sampled."""
    generator = torch.Generator().manual_seed(5)
    logits, reference = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    reference = reference.log_softmax(0)
    pi = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((pi.exp() * (pi - reference)).sum(), logits, retain_graph=True)

    def expected(estimator):
        penalty = losses.kl_penalty(pi, reference, torch.ones(7, dtype=torch.bool), estimator)
        weighed = (pi.exp().detach() * penalty).sum()
        return torch.autograd.grad(weighed, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected("k2"), exact)
    (reverse,) = torch.autograd.grad(
        (reference.exp() * (reference - pi)).sum(), logits, retain_graph=True
    )
    torch.testing.assert_close(expected("k3"), reverse)
    torch.testing.assert_close(expected("k1"), torch.zeros_like(exact))
    assert (reverse - exact).abs().max() > 0.1
    assert Settings(kl={"coefficient": 1e-3}).kl.estimate == "k2"
    assert Settings(kl={"coefficient": 1e-3, "into": "reward"}).kl.estimate == "k1"


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


def test_a_kl_penalty_can_be_anchored_at_the_policy_that_sampled():
    """prime-rl adds 1e-3 of the squared log-ratio to mu: twice k2."""
    batch, logprobs = random_batch()
    settings = {"old_policy": "rollout", "loss": "dppo_tv"}
    plain = Algorithm(Settings(**settings), 10)
    held = Algorithm(Settings(**settings, kl={"coefficient": 2e-3, "anchor": "rollout"}), 10)
    assert not held.settings.keeps_reference
    unscored = Batch(**{f.name: getattr(batch, f.name) for f in fields(Batch)}).scored(None)
    prepared = held.prepare(unscored)
    expected = plain.token_losses(logprobs, prepared)[0]
    expected = expected + 1e-3 * ((logprobs - batch.mu_logprobs) * batch.mask) ** 2
    torch.testing.assert_close(held.token_losses(logprobs, prepared)[0], expected)


def test_overlong_shaping_reaches_the_advantages():
    """By all that follows the prompt, of which an environment may have said a part."""
    batch, _ = random_batch()
    batch.mask[:2] = torch.zeros_like(batch.mask[:2])
    batch.mask[0, [1, 3]] = batch.mask[1, [1, 4]] = True
    settings = Settings(advantage="reinforce", overlong={"buffer": 2, "penalty": 0.5})
    prepared = Algorithm(settings, max_tokens=4).prepare(batch)
    follow = np.array([np.ptp(np.flatnonzero(row)) + 1 for row in batch.mask.numpy()])
    assert follow[:2].tolist() == [3, 4]
    lost = 0.5 * np.clip((follow - 2) / 2, 0, 1)
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
        (
            {"correction": {"ratio": "k3_max", "action": "mask", "high": 1.0}},
            "use it with .*reject",
        ),
        ({"loss": "gspo", "dual_clip": 3.0}, "dual_clip goes with loss=ppo_clip"),
        ({"loss": "dppo_kl"}, "anchored at the policy that sampled: set old_policy: rollout"),
        ({"delta": 0.1}, "delta goes with loss=dppo_tv, dppo_kl, drpo, not with ppo_clip"),
        (
            {"kl": {"coefficient": 0.1, "anchor": "rollout", "into": "reward"}},
            "anchor=rollout: in the reward",
        ),
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
