"""MXFP4 weights, as gpt-oss is published with: numbers of four bits, 32 of them with one exponent.

OCP Microscaling Formats (MX) 1.0, section 5.3: a number is a sign, two bits of exponent and one of mantissa
(E2M1); the exponent that a block shares is a power of two (E8M0). A half holds each product exactly, but for those
beyond its range.
"""

import torch

BLOCKS, SCALES = "_blocks", "_scales"  # endings of the two tensors that stand for one
_BIAS = 127  # of the shared exponent
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits; the fourth is the sign


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[..., columns, rows], bf16.

    blocks: [..., rows, blocks, 16] uint8, the first of two numbers in a byte's low bits. scales: [..., rows, blocks]
    uint8.
    """
    numbers = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)], dtype=torch.bfloat16)
    pairs = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - _BIAS
    return torch.ldexp(numbers[pairs.int()], exponents).flatten(-2).mT
