"""The loss scaler and the underflow fraction, in one process."""

import pytest
import torch

from megatron_fp16rl.learner.loss_scale import LossScaler, underflow_fraction
from megatron_fp16rl.recipe import LossScale


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('pg')}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_underflow_fraction_equals_what_a_cast_to_fp16_loses(alone):
    exponents, cpu = torch.arange(-40, 4).float(), torch.device("cpu")
    numbers = torch.cat([2.0**exponents, -1.4 * 2.0**exponents])
    zeros, expert = torch.zeros(12), torch.cat([torch.zeros(30), torch.ones(70)])
    gone = [int((gradient.half() == 0).sum()) for gradient in (numbers, zeros, expert)]
    assert 0.2 < gone[0] / len(numbers) < 0.5
    assert underflow_fraction([numbers, zeros], [], cpu) == pytest.approx(sum(gone[:2]) / 100)
    # An expert without tokens is left out, one with some is not.
    assert underflow_fraction([numbers, zeros], [zeros], cpu) == pytest.approx(sum(gone[:2]) / 100)
    assert underflow_fraction([numbers, zeros], [expert], cpu) == pytest.approx(sum(gone) / 200)
    assert underflow_fraction([], [zeros], cpu) == 1
    assert underflow_fraction([], [], cpu) == 0


def test_state_is_restored_and_hysteresis_tolerates_the_first_overflow(alone):
    settings = LossScale(initial=64, window=2, hysteresis=2, minimum=16)
    scaler = LossScaler(settings, torch.device("cpu"))
    overflows, scales = [True, False, True, True, True, False, False, False, True, True], []
    for i, found_inf in enumerate(overflows):
        if i == 5:  # a resumed run goes on as the old one would have
            state = scaler.state_dict()
            scaler = LossScaler(settings, torch.device("cpu"))
            scaler.load_state_dict(state)
        scaler.update(found_inf)
        scales.append(scaler.scale.item())
    assert scales == [64, 64, 32, 16, 16, 16, 32, 32, 32, 16]
    assert scaler.skipped_total == 6
    gradients = [torch.tensor([32.0, 8.0])]
    assert not scaler.unscale(gradients)
    assert gradients[0].tolist() == [2.0, 0.5]
    assert scaler.unscale([torch.tensor([torch.nan])])
