"""The rules that a rehearsal holds a resume against: the loss scale's, and Adam's."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fp16rl.learner.loss_scale import LossScaler
from megatron_fp16rl.recipe import LossScale, Optimizer
from megatron_fp16rl.tools.rehearse.resume import Scaler, adam_fault, scalers_after


@given(
    st.lists(st.booleans(), max_size=40),
    st.lists(st.booleans(), max_size=12),
    st.builds(
        LossScale,
        initial=st.sampled_from([2.0, 2.0**15]),
        window=st.integers(1, 5),
        hysteresis=st.integers(1, 3),
    ),
)
def test_the_loss_scalers_own_way_is_among_those_that_are_allowed(before, step, settings):
    """Events: whether an update overflowed. If all do or none does, it is the only way."""
    scaler = LossScaler(settings, torch.device("cpu"))
    for overflow in before:
        scaler.update(overflow)
    start = Scaler(**scaler.state_dict())
    for overflow in step:
        scaler.update(overflow)
    allowed = scalers_after(start, step.count(False), step.count(True), settings)
    assert Scaler(**scaler.state_dict()) in allowed
    assert len(allowed) == 1 or len(set(step)) == 2


SETTINGS = [
    Optimizer(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.1),
    Optimizer(lr=1e-3, beta1=0.9, beta2=0.95),
    Optimizer(lr=3e-2, beta1=0.8, beta2=0.98, eps=1e-15, weight_decay=0.5),
]


def adam_of(settings, seed):
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(4000))
    adam = torch.optim.AdamW(
        *([weight], settings.lr, (settings.beta1, settings.beta2), settings.eps),
        weight_decay=settings.weight_decay,
    )
    return weight, adam


def step(weight, adam, updates):
    """Gradients of very different sizes, some of them zero, some too small to be squared in fp32."""
    for _ in range(updates):
        size = 10.0 ** torch.randint(-25, 3, weight.shape)
        weight.grad = torch.randn_like(weight) * size * (torch.rand_like(weight) > 0.2)
        adam.step()


def state(weight, adam):
    kept = adam.state[weight]
    return [t.detach().clone() for t in (weight, kept["exp_avg"], kept["exp_avg_sq"])]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("updates", [1, 2, 16])
def test_adam_passes_and_adam_without_its_moments_does_not(settings, updates):
    for seed in range(3):
        weight, adam = adam_of(settings, seed)
        step(weight, adam, 2 * updates)
        old, lost = state(weight, adam), copy.deepcopy(adam.state[weight])
        torch.manual_seed(seed)
        step(weight, adam, updates)
        known = (updates, 2 * updates, settings.lr, settings)
        assert adam_fault(old, state(weight, adam), *known) is None
        for name in ("exp_avg", "exp_avg_sq"):
            weight.data.copy_(old[0])
            adam.state[weight] = copy.deepcopy(lost)
            adam.state[weight][name].zero_()
            torch.manual_seed(seed)
            step(weight, adam, updates)
            assert "do not follow" in adam_fault(old, state(weight, adam), *known), name


@pytest.mark.parametrize("settings", SETTINGS)
def test_of_several_updates_a_weight_that_is_too_far_is_found(settings):
    weight, adam = adam_of(settings, 0)
    step(weight, adam, 8)
    old = state(weight, adam)
    step(weight, adam, 4)
    new = state(weight, adam)
    new[0][7] += 100 * settings.lr
    known = (4, 8, settings.lr, settings)
    assert adam_fault(old, new, *known).startswith("1 of 4000 elements of the weights")
