"""Several ranks for one row: `python -m megatron_fp16rl.tools.selftest.ranks MODULE.FUNCTION FOLDER ARGUMENTS`"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import (
    die_with_parent,
    free_port,
    local_rank_environment,
    spawn,
    stop,
    tail,
)

_ON_CPU = 2
_GRACE_S = 10  # for the other ranks, once one has failed
_MACHINE = "FP16RL_SELFTEST_MACHINE"
_PACKAGE = "megatron_fp16rl.tools.selftest"


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
    count: int,
    function: str,
    folder: Path,
    arguments: Mapping[str, Any],
    timeout_s: float = 300,
    everywhere: bool = False,
) -> list[Any]:
    """Calls "module.function" of this package on so many ranks of this machine; what each returned, which is JSON.

    folder: empty, for their files. everywhere: with the ranks of the other machines, each of which calls
    this too, in one world. Raises RuntimeError if a rank fails or is late.
    """
    folder.mkdir()
    machines, own = nodes() if everywhere else (1, 0)
    port = int(os.environ["MASTER_PORT"]) if machines > 1 else free_port("127.0.0.1")
    children = []
    for local in range(count):
        environment = local_rank_environment(local, count, port)
        if machines > 1:
            del environment["GLOO_SOCKET_IFNAME"], environment["MASTER_ADDR"]  # those of the job
            environment[_MACHINE] = str(own)
            environment["RANK"] = str(own * count + local)
            environment["WORLD_SIZE"] = str(machines * count)
        command = [sys.executable, "-m", f"{_PACKAGE}.ranks", function]
        command += [str(folder / f"{local}.json"), json.dumps(arguments)]
        children.append(spawn(command, folder / f"{local}.log", environment))
    try:
        codes = _wait(children, timeout_s)
    finally:
        stop(children, patience_s=0)
    for local, code in enumerate(codes):
        if code:
            why = "took too long" if code == -signal.SIGKILL else f"ended with {code}"
            raise RuntimeError(f"rank {local} {why}:\n{tail(folder / f'{local}.log')}")
    return [json.loads((folder / f"{local}.json").read_text()) for local in range(count)]


def _wait(children: list[subprocess.Popen], timeout_s: float) -> list[int]:
    """Exit codes; those that are late are killed. The first to fail is the only one that is not 0."""
    deadline = time.monotonic() + timeout_s
    failed: int | None = None
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        if failed is None and any(child.poll() for child in children):
            failed = next(i for i, child in enumerate(children) if child.poll())
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.05)
    for child in children:
        child.kill()
    codes = [child.wait() for child in children]
    return codes if failed is None else [code * (i == failed) for i, code in enumerate(codes)]


def main() -> None:
    """A rank: writes what the function returns; an error ends it without an answer."""
    die_with_parent()
    module, function = sys.argv[1].split(".")
    result = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)(
        **json.loads(sys.argv[3])
    )
    write_text(Path(sys.argv[2]), json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # an orderly exit would wait for groups of ranks that have gone


if __name__ == "__main__":
    main()
