"""FP16 and BF16 matrix products on a CPU: multiply in fp32, round the result once.

This is what tensor cores do: 16-bit operands, fp32 accumulation. Without instructions for them a CPU's own
kernels are slow (fp16: a 4-layer model trains 13 times slower; bf16: products take 4 to 14 times as long;
docs/LOG.md), and how they accumulate depends on the CPU. Learner and server install the same override, so
that neither brings a GEMM of its own into the training-inference mismatch.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

_OPERATORS = ("mm", "bmm", "addmm", "baddbmm")
_library: torch.library.Library | None = None


def install() -> None:
    """Overrides the CPU kernels of mm, bmm, addmm and baddbmm for float16 and bfloat16. Idempotent."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch warns that a kernel is overridden: intended
        warnings.simplefilter("ignore", UserWarning)
        for name in _OPERATORS:
            native = torch.library.get_kernel(f"aten::{name}", "CPU")
            _library.impl(name, _through_fp32(native), "CPU", with_keyset=True, allow_override=True)


def _through_fp32(native: Any) -> Callable[..., torch.Tensor]:
    def product(keys: Any, *tensors: torch.Tensor, **scalars: float) -> torch.Tensor:
        dtype = tensors[0].dtype
        if dtype in (torch.float16, torch.bfloat16):
            return native.call_boxed(keys, *(t.float() for t in tensors), **scalars).to(dtype)
        return native.call_boxed(keys, *tensors, **scalars)

    return product
