"""Several ranks for one row."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.tools.selftest import process
from megatron_fp16rl.utils.processes import free_port, local_rank_environment

_ON_CPU = 2
_MACHINE = "FP16RL_SELFTEST_MACHINE"
_TIMEOUT_S = 300


def here() -> int:
    """How many ranks this machine takes: one a GPU; two on CPUs."""
    return torch.cuda.device_count() if platform.current().NAME == "cuda" else _ON_CPU


def nodes() -> tuple[int, int]:
    """How many machines run this selftest, and which of them this is: see job.py."""
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def machine() -> str:
    """What tells this machine, as this selftest counts them, from others."""
    return os.environ.get(_MACHINE, "0")


def run(
    count: int, function: str, folder: Path, arguments: Mapping[str, Any], everywhere: bool = False
) -> list[Any]:
    """As process.call, on so many ranks of this machine.

    everywhere: with the ranks of the other machines, each of which calls this too, in one world.
    """
    machines, own = nodes() if everywhere else (1, 0)
    port = int(os.environ["MASTER_PORT"]) if machines > 1 else free_port("127.0.0.1")
    environments = [local_rank_environment(local, count, port) for local in range(count)]
    for local, environment in enumerate(environments if machines > 1 else ()):
        del environment["GLOO_SOCKET_IFNAME"], environment["MASTER_ADDR"]  # those of the job
        environment[_MACHINE] = str(own)
        environment["RANK"] = str(own * count + local)
        environment["WORLD_SIZE"] = str(machines * count)
    return process.call(function, folder, arguments, _TIMEOUT_S, environments)
