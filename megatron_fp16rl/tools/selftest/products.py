"""Row products: in what matrix products of fp16 are summed."""

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most, equal

_ROWS = (1, 16, 256)  # decoding, a small batch, learning
_LENGTHS = (4096, 12288, 32768)
_COLUMNS, _FEW_COLUMNS = 256, 64
_UNITS = 1.0  # half for rounding to fp16, half for the sum
_SUM = 1e-4  # an fp32 sum; rounded to fp16 it is up to 5e-4 off
_ROUNDED = 2.0**-11  # TF32 rounds the gradient to as many bits as fp16 has
_HALF = 16384  # of 4s: 65,536, beyond fp16


def products(setting: Setting) -> list[Check]:
    """Random products, by the length of their sums; a sum of zero whose halves fp16 does not hold; fp32 logits."""
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
    for name, wide, limit in (
        ("logits in fp32, over a usual one", False, _SUM),
        ("products of their gradient, over a usual one", True, _ROUNDED),
    ):
        checks.append(at_most(name, _fp32_error(wide, columns, device), limit))
    # A context-parallel rank may have no token to predict.
    none = here.fp32_product(left[:0], right.T)
    return [*checks, equal("rows of the logits of no token", len(none), 0)]


def _fp32_error(wide: bool, columns: int, device: torch.device) -> float:
    """Of products as with precision.head: fp32. wide: the left operand is fp32, as a gradient of logits."""
    left, right = (_random(n, _LENGTHS[0], n, device) for n in (256, columns + 1))
    left = left if wide else left.half()
    exact = left.double() @ right.half().double().T
    apart = platform.current().fp32_product(left, right.half().T).double() - exact
    return (apart.abs().max() / exact.pow(2).mean().sqrt()).item()


def _error(rows: int, length: int, columns: int, device: torch.device) -> float:
    """Of random products, the largest."""
    left, right = (_random(n, length, rows + n, device).half() for n in (rows, columns))
    exact = left.double() @ right.double().T
    return units_apart(torch.nn.functional.linear(left, right), exact)


def _random(rows: int, length: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, length, generator=generator, device=device)


def units_apart(half: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, in units of the last place of fp16: of the result, or of a usual one if that is larger."""
    usual = exact.pow(2).mean().sqrt()
    unit = torch.maximum(exact.abs(), usual).log2().floor().sub(10).exp2()
    return ((half.double() - exact).abs() / unit).max().item()
