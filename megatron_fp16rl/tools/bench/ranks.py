"""The ranks of a benchmark: those that torchrun, mpirun or srun started, or this process alone."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch import bootstrap
from megatron_fp16rl.utils.processes import free_port

JOB_FOLDER = "FP16RL_JOB_FOLDER"  # the variable of a job of `fp16rl bench --nodes`


def launched(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of ranks that a launcher started; None if it did not start several."""
    if "RANK" in environment:  # torchrun
        return int(environment["WORLD_SIZE"])
    size = bootstrap.launcher_world_size(environment)
    return size if size > 1 else None


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Makes this process one of the launched ranks, or a world of one; yields its rank.

    An error among several ranks ends this process at once: the collectives that other ranks wait in
    cannot be called off, and an orderly exit would wait for their timeout.
    """
    size = launched()
    if size is None:
        from megatron_fp16rl.parallel import single_process_environment

        single_process_environment(free_port("127.0.0.1"))
    elif JOB_FOLDER in os.environ:
        bootstrap.from_slurm(Path(os.environ[JOB_FOLDER]))
    elif "RANK" not in os.environ:
        bootstrap.from_mpi()
    try:
        yield int(os.environ["RANK"])
    except BaseException as error:
        if size is None:
            raise
        if not hasattr(error, "exit_code"):  # else it is typer.Exit: the message is printed already
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
