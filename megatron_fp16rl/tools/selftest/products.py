"""Row products: in what matrix products of fp16 are summed."""

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most, equal

_ROWS = (1, 16, 256)  # decoding, a small batch, learning
_LENGTHS = (4096, 12288, 32768)
_COLUMNS, _FEW_COLUMNS = 256, 64
_UNITS = 1.0  # half for rounding to fp16, half for the sum
_HALF = 16384  # of 4s: 65,536, beyond fp16


def products(setting: Setting) -> list[Check]:
    """Random products, by the length of their sums; and a sum of zero whose halves fp16 does not hold."""
    here = platform.current()
    here.prepare_learner()
    device, columns = here.device(), _FEW_COLUMNS if setting.quick else _COLUMNS
    checks = [
        at_most(
            f"units of the last place, sums of {length:,}",
            max(_error(rows, length, columns, device) for rows in _ROWS),
            _UNITS,
        )
        for length in _LENGTHS
    ]
    left = torch.full((16, 2 * _HALF), 2.0, dtype=torch.float16, device=device)
    right = torch.full((columns, 2 * _HALF), 2.0, dtype=torch.float16, device=device)
    right[:, _HALF:] = -2.0
    for rows in (1, 16):
        total = torch.nn.functional.linear(left[:rows], right).abs().max().item()
        checks.append(
            equal(f"65,536 - 65,536, rows: {rows}", total if total == total else "nan", 0)
        )
    return checks


def _error(rows: int, length: int, columns: int, device: torch.device) -> float:
    """Of random products, the largest."""
    generator = torch.Generator(device).manual_seed(rows)

    def random(size: int) -> torch.Tensor:
        drawn = torch.randn(size, length, generator=generator, device=device)
        return drawn.half()

    left, right = random(rows), random(columns)
    exact = left.double() @ right.double().T
    return units_apart(torch.nn.functional.linear(left, right), exact)


def units_apart(half: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, in units of the last place of fp16: of the result, or of a usual one if that is larger."""
    usual = exact.pow(2).mean().sqrt()
    unit = torch.maximum(exact.abs(), usual).log2().floor().sub(10).exp2()
    return ((half.double() - exact).abs() / unit).max().item()
