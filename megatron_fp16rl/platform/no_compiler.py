"""torch.compile on a CPU: nothing is compiled.

Whether Megatron's and SGLang's functions run compiled or not, they compute the same; but decorating them
alone imports torch's compiler: 1.3 s of a rank's start, 2 s of a server's, in CPU time.
"""

import sys
from typing import Any

import torch

_torch: Any = torch  # under this name its functions are replaced


def install() -> None:
    """Makes torch.compile return what it is given. Idempotent."""

    def compile(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    _torch.compile = compile
    if (
        dynamo := sys.modules.get("torch._dynamo")
    ) is not None:  # something may be decorated already
        dynamo.config.disable = True
