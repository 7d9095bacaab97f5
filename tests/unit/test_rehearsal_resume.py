"""The rules by which a rehearsal calculates a resumed step again: the loss scale's, and Adam's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fp16rl.learner.loss_scale import LossScaler
from megatron_fp16rl.recipe import LossScale, Optimizer
from megatron_fp16rl.tools.rehearse.resume import adam_fault, scaler_after


@given(
    st.lists(st.booleans(), max_size=40),
    st.builds(LossScale, window=st.integers(1, 5), hysteresis=st.integers(1, 3)),
)
def test_the_loss_scale_after_an_update_is_the_scalers(overflows, settings):
    scaler = LossScaler(settings, torch.device("cpu"))
    for overflow in overflows:
        scaler.update(overflow)
    expected = scaler_after(scaler.state_dict(), settings)
    scaler.update(False)
    assert scaler.state_dict() == expected


def parameter_after(updates, settings, seed=0):
    """A weight and torch's AdamW after so many updates, with gradients of very different sizes."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(4000))
    adam = torch.optim.AdamW(
        [weight],
        settings.lr,
        (settings.beta1, settings.beta2),
        settings.eps,
        weight_decay=settings.weight_decay,
    )
    for _ in range(updates):
        update(weight, adam)
    return weight, adam


def update(weight, adam):
    size = 10.0 ** torch.randint(-25, 3, weight.shape)
    weight.grad = torch.randn_like(weight) * size * (torch.rand_like(weight) > 0.2)
    adam.step()


def state(weight, adam):
    moments = adam.state[weight]
    return tuple(t.detach().clone() for t in (weight, moments["exp_avg"], moments["exp_avg_sq"]))


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.1),
        Optimizer(lr=3e-2, beta1=0.8, beta2=0.98, eps=1e-15),
    ],
)
@pytest.mark.parametrize(
    ("lost", "fault"),
    [
        (None, None),
        ("exp_avg", "exp_avg and exp_avg_sq"),
        ("exp_avg_sq", "exp_avg and exp_avg_sq"),
        ("weight", "the weights"),
    ],
)
def test_adam_that_has_lost_a_part_of_its_state_is_noticed(settings, lost, fault):
    weight, adam = parameter_after(3, settings)
    old, imported = state(weight, adam), parameter_after(0, settings)[0]
    if lost == "weight":
        weight.data.copy_(imported.data)
    elif lost:
        adam.state[weight][lost].zero_()
    update(weight, adam)
    assert adam_fault(old, state(weight, adam), 4, settings.lr, settings) == fault
