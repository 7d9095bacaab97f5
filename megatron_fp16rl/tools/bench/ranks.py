"""The ranks of a benchmark: those that a launcher started, or children of this process."""

import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch import bootstrap, command
from megatron_fp16rl.utils.processes import (
    die_with_parent,
    free_port,
    local_rank_environment,
    spawn,
    stop,
)


def launched(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of ranks that a launcher started; None if it did not start several."""
    if "RANK" in environment:  # torchrun, or `start`
        return int(environment["WORLD_SIZE"])
    size = bootstrap.launcher_world_size(environment)
    return size if size > 1 else None


def start(ranks: int) -> int:
    """Runs this command line as `ranks` processes on this machine; returns an exit code.

    Only rank 0 prints results. Unlike torchrun's, these processes die with this one.
    """
    port = free_port("127.0.0.1")
    line = [sys.executable, "-m", "megatron_fp16rl.cli", *sys.argv[1:]]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            environment = local_rank_environment(rank, ranks, port)
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
            output = subprocess.DEVNULL if rank else None
            nowhere = Path(os.devnull)
            children.append(spawn(line, nowhere, environment, stdout=output, stderr=None))
        while True:
            codes = [child.poll() for child in children]
            for rank, code in enumerate(codes):
                if code:
                    print(f"error: rank {rank} ended with code {code}", file=sys.stderr)
                    return code if code > 0 else 1
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.05)
    finally:
        stop(children)


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Makes this process one of the launched ranks, or a world of one; yields its rank.

    An error among several ranks ends this process at once: the collectives that other ranks wait in
    cannot be called off, and an orderly exit would wait for their timeout.
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
        code = getattr(error, "exit_code", None)  # typer.Exit: the message is printed already
        if code is None:
            traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1 if code is None else code)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
