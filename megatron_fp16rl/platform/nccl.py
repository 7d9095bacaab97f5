"""NCCL settings on which all ranks of one communicator must agree.

Rank 0 of the learner and every rank of every server are one group, over which weights are sent. SGLang
0.5.23 sets such variables in its own processes (entrypoints/engine.py, arg_groups/attention_hook.py);
handles of another kind of memory, or other counts of channels, are a crash or a hang at the first
broadcast. Without NCCL nothing reads them.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Protocol

_CUMEM, _NVLS = "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"
_DETERMINISTIC = ("NCCL_ALGO", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS")
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
NAMES = (_CUMEM, _NVLS, *_DETERMINISTIC)


class ServerOptions(Protocol):
    """Of a server's settings, those that the variables depend on."""

    @property
    def tensor_parallel(self) -> int: ...
    @property
    def deterministic(self) -> bool: ...
    @property
    def sglang(self) -> Mapping[str, object]: ...


def agreed(rollout: ServerOptions) -> dict[str, str]:
    """The variables for learner ranks, before their first collective, and for servers alike.

    They are SGLang's own values; what is set in the environment goes before them, as far as SGLang
    leaves it, on both sides.
    """
    options = rollout.sglang  # names with underscores: recipe/rollout.py
    needs_cumem = options.get("moe_a2a_backend") == "deepep_v2"
    values = {_CUMEM: str(int(needs_cumem)), _NVLS: "0"}
    if rollout.deterministic and rollout.tensor_parallel > 1:
        channels = os.environ.get("SGLANG_DETERMINISTIC_NCCL_NCHANNELS", "8")
        values.update(zip(_DETERMINISTIC, ("allreduce:tree", channels, channels), strict=True))
    values.update({name: os.environ[name] for name in values if name in os.environ})
    # With these options SGLang ignores the environment.
    if options.get("enable_symm_mem"):
        values.update({_CUMEM: "1", _NVLS: "1"})
    if options.get("enable_nccl_nvls"):
        values[_NVLS] = "1"
    return values


@contextlib.contextmanager
def without_watchdog() -> Iterator[None]:
    """A process group made in the block can fail, and be aborted, without ending this process.

    torch (ProcessGroupNCCL.hpp) reads the variable when it makes one: by default its watchdog ends the
    process after an error or a timeout, and its `_abort_process_group` is for groups without that.
    """
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ERROR_HANDLING]
        else:
            os.environ[_ERROR_HANDLING] = before
