"""The ranks of a benchmark: joined if a launcher started them, else started on this machine."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch import bootstrap, command
from megatron_fp16rl.utils.processes import die_with_parent, free_port, spawn, stop, tail


def launched(environment: Mapping[str, str] = os.environ) -> int | None:
    """Of how many ranks this process is one; None if no launcher started several."""
    if "RANK" in environment:  # torchrun, or `start`
        return int(environment["WORLD_SIZE"])
    size = bootstrap.launcher_world_size(environment)
    return size if size > 1 else None


def start(ranks: int) -> int:
    """Runs this very command `ranks` times on this machine, as torchrun would; returns an exit code.

    Rank 0 has this terminal. What another rank said is shown if it fails.
    """
    port = free_port("127.0.0.1")
    children: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for rank in range(ranks):
                environment = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": "lo",
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                }
                command = [sys.executable, "-m", "megatron_fp16rl.cli", *sys.argv[1:]]
                terminal = {} if rank else {"stdout": None, "stderr": None}
                children.append(spawn(command, _log(logs, rank), environment, **terminal))
            return _wait(children, logs)
        finally:
            stop(children)


def _wait(children: list[subprocess.Popen], logs: str) -> int:
    """Until all have ended well, or one has not."""
    while True:
        codes = [child.poll() for child in children]
        for rank, code in enumerate(codes):
            if code:
                said = f":\n{tail(_log(logs, rank))}" if rank else ""
                print(f"error: rank {rank} ended with code {code}{said}", file=sys.stderr)
                return code if code > 0 else 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _log(logs: str, rank: int) -> Path:
    return Path(logs) / f"rank_{rank}.log"


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """This process as a rank among others, or as a world of one; gives its number.

    What goes wrong inside ends this process at once: a collective that the others never join cannot
    be called off, and an orderly exit would wait for its timeout.
    """
    die_with_parent()
    size = launched()
    if size is None:
        from megatron_fp16rl.parallel import single_process_environment

        single_process_environment(free_port("127.0.0.1"))
    elif "RANK" not in os.environ:
        job = command.folder()
        bootstrap.from_mpi() if job is None else bootstrap.from_slurm(job)
    try:
        yield int(os.environ["RANK"])
    except BaseException as error:
        if size is None:
            raise
        code = getattr(error, "exit_code", None)  # typer's, of an error that has been explained
        if code is None:
            traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1 if code is None else code)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
