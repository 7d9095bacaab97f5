"""Several ranks for one row; and several machines, each a task of a job, whose reports become one."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launch import bootstrap, outcome
from megatron_fp16rl import platform
from megatron_fp16rl.tools.selftest import process
from megatron_fp16rl.tools.selftest.result import Report
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import free_port, local_rank_environment

_ON_CPU = 2
_MACHINE = "FP16RL_SELFTEST_MACHINE"
_TIMEOUT_S = 300
_PATIENCE_S = 3600.0  # for the slowest machine


def here() -> int:
    """How many ranks this machine takes: one a GPU; two on CPUs."""
    return torch.cuda.device_count() if platform.current().NAME == "cuda" else _ON_CPU


def nodes() -> tuple[int, int]:
    """How many machines run this selftest, and which of them this is."""
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


def join(folder: Path) -> bool:
    """Makes this task of a job's step one of the selftest's machines; whether it is the first."""
    bootstrap.from_slurm(folder)
    return nodes()[1] == 0


def merge(folder: Path, report: Report) -> Report | None:
    """The report of all machines, on the first of them; None on the others.

    The outcome goes to where `fp16rl status` finds it. Raises RuntimeError if a machine does not answer.
    """
    machines, own = nodes()
    files = [folder / f"machine_{machine}.json" for machine in range(machines)]
    write_text(files[own], report.model_dump_json())
    if own:
        return None
    deadline = time.monotonic() + _PATIENCE_S
    while missing := [file.name for file in files if not file.exists()]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {_PATIENCE_S:g} s there is no {', '.join(missing)}")
        time.sleep(0.5)
    reports = [Report.model_validate_json(file.read_text()) for file in files]
    hosts = [host for one in reports for host in one.machine["hosts"]]
    whole = Report(
        passed=all(one.passed for one in reports),
        quick=report.quick,
        machine={**report.machine, "hosts": hosts},
        rows=[row for one in reports for row in one.rows],
    )
    outcome.write(folder, outcome.DONE if whole.passed else outcome.FAILED, whole.summary)
    return whole
