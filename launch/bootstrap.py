"""Who this process is among the processes of a job, and where they meet.

Whatever started it (mpirun, srun, torchrun, our local launcher), a process ends up with the variables
that torch.distributed reads: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_fp16rl.files import write_text
from megatron_fp16rl.processes import free_port

# How many processes each launcher says that it started.
_PROMISES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


class BootstrapError(RuntimeError):
    """The processes of a job do not find each other. The message names the likely cause."""


def from_mpi(interface: str | None = None) -> None:
    """Agrees over MPI on ranks and on a meeting point, and sets the variables.

    interface: of the network that the ranks are to use, e.g. ib0; by default what the host's name
    stands for. Raises BootstrapError if MPI knows of fewer processes than were started.
    """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    check_size(world.size, os.environ, MPI.Get_library_version().splitlines()[0])
    hosts = world.allgather(socket.gethostname())
    meeting = None
    if world.rank == 0:
        several = len(set(hosts)) > 1
        host = address(interface) if several or interface else "127.0.0.1"
        meeting = (host, free_port(host))
    host, port = world.bcast(meeting)
    os.environ.update(
        RANK=str(world.rank),
        LOCAL_RANK=str(local_rank(hosts, world.rank)),
        WORLD_SIZE=str(world.size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )


def from_slurm(folder: Path, interface: str | None = None, timeout_s: float = 300) -> None:
    """Agrees, through a file in a folder that all nodes share, on a meeting point, under srun.

    Ranks are Slurm's. Raises BootstrapError if rank 0 does not say where it is.
    """
    here = os.environ
    rank, size = int(here["SLURM_PROCID"]), int(here["SLURM_STEP_NUM_TASKS"])
    several = int(here["SLURM_STEP_NUM_NODES"]) > 1
    # A requeued job has the number it had, and counts its steps from the start again.
    turn = (here["SLURM_JOB_ID"], here.get("SLURM_RESTART_COUNT", "0"), here["SLURM_STEP_ID"])
    file = folder / f"rendezvous-{'-'.join(turn)}"
    own = address(interface) if several or interface else "127.0.0.1"
    if rank == 0:
        write_text(file, f"{own} {free_port(own)}", mode=0o600)
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() > deadline:
            raise BootstrapError(
                f"rank 0 has not written {file} in {timeout_s:.0f} s: it did not start, or the run "
                "directory is not on a file system that all nodes share"
            )
        time.sleep(0.1)
    host, port = file.read_text().split()
    here.update(
        RANK=str(rank),
        LOCAL_RANK=here["SLURM_LOCALID"],
        WORLD_SIZE=str(size),
        MASTER_ADDR=host,
        MASTER_PORT=port,
    )
    use_interface_of(own)


def use_interface_of(own: str) -> None:
    """Has gloo and NCCL talk over the interface with an address, unless the user has said which."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if own != "127.0.0.1":
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return


def check_size(size: int, environment: dict[str, str], library: str) -> None:
    """Raises BootstrapError if MPI's world is smaller than the launcher promised.

    With a launcher that the MPI library does not understand, each process is a world of one.
    """
    promised = max((int(environment[name]) for name in _PROMISES if name in environment), default=0)
    if size < promised:
        raise BootstrapError(
            f"MPI knows of {size} process(es), but {promised} were started: {library} and the "
            "launcher do not speak the same language. With srun try --mpi=pmi2 for MPICH and "
            "--mpi=pmix for Open MPI (slurm.mpi in the recipe); with mpirun use the one of mpi4py's "
            "own library"
        )


def local_rank(hosts: Sequence[str], rank: int) -> int:
    """The number of ranks before `rank` on its host; hosts: of all ranks, in order."""
    return list(hosts[:rank]).count(hosts[rank])


def address(interface: str | None = None) -> str:
    """This host's IPv4 address that other hosts can reach. Raises BootstrapError if there is none."""
    if interface is not None:
        found = psutil.net_if_addrs().get(interface)
        if found is None:
            known = ", ".join(sorted(psutil.net_if_addrs()))
            raise BootstrapError(f"there is no network interface {interface!r}; there are: {known}")
        for entry in found:
            if entry.family == socket.AF_INET:
                return entry.address
        raise BootstrapError(f"network interface {interface!r} has no IPv4 address")
    name = socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except socket.gaierror as error:
        raise BootstrapError(f"this host's own name {name!r} does not resolve: {error}") from None
    if found.startswith("127."):
        raise BootstrapError(
            f"this host's name {name!r} stands for {found}, which no other host can reach; name the "
            "network interface to use"
        )
    return found
