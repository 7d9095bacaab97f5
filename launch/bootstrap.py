"""Finds rank, world size and rendezvous of a process that srun or mpirun started.

However it was started, the process ends up with the variables that torch.distributed reads: RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT; and with the network interface that leads to rank 0.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from megatron_fp16rl.platform import nccl
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.processes import free_port

_WORLD_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")
_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_RENDEZVOUS_TIMEOUT_S = 300.0


class BootstrapError(FinalError):
    """The processes of a job do not find each other. The message names the likely cause."""


def from_slurm(folder: Path, interface: str | None = None) -> None:
    """Takes the rank from srun and rank 0's address from a file in the run directory.

    The file is of this step and this start of the job: a stale one is never read. Raises
    BootstrapError if rank 0 does not write it.
    """
    slurm = os.environ
    rank = int(slurm["SLURM_PROCID"])
    start = slurm.get("SLURM_RESTART_COUNT", "0")  # a requeued job keeps its number
    step = f"{slurm['SLURM_JOB_ID']}-{slurm['SLURM_STEP_ID']}"
    file = folder / "private" / f"rendezvous-{step}-{start}"
    if rank == 0:
        for old in file.parent.glob("rendezvous-*"):
            old.unlink()
        host = own_address(interface) if spans_nodes(slurm) or interface else "127.0.0.1"
        write_json(file, [host, free_port(host)], mode=0o600)
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise BootstrapError(
                f"rank 0 did not write {file} in {_RENDEZVOUS_TIMEOUT_S:g} s: see its log; or the run "
                "directory is not on a file system that all nodes share"
            )
        time.sleep(0.1)
    size, local = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm["SLURM_LOCALID"])
    _set_variables(rank, local, size, *json.loads(file.read_text()))


def spans_nodes(slurm: Mapping[str, str]) -> bool:
    """Whether a job has several nodes."""
    return int(slurm["SLURM_JOB_NUM_NODES"]) > 1


def from_mpi(interface: str | None = None) -> None:
    """Agrees over MPI on rank 0's address and sets the variables. Collective.

    interface: of the network that ranks use, e.g. ib0; by default that of the host's name. Raises
    BootstrapError on all ranks.
    """
    world = mpi_world()
    hosts = world.allgather(socket.gethostname())
    address = error = None
    if world.rank == 0:
        try:
            host = own_address(interface) if len(set(hosts)) > 1 or interface else "127.0.0.1"
            address = (host, free_port(host))
        except BootstrapError as refusal:
            error = str(refusal)
    # mpirun may carry the environment to its own host only: rank 0's NCCL settings count.
    chosen = {name: os.environ[name] for name in nccl.NAMES if name in os.environ}
    address, error, chosen = world.bcast((address, error, chosen))
    if error:
        raise BootstrapError(error)
    for name in nccl.NAMES:
        os.environ.pop(name, None)
    os.environ.update(chosen)
    local = hosts[: world.rank].count(hosts[world.rank])
    _set_variables(world.rank, local, world.size, *address)


def mpi_rank() -> int | None:
    """This process's rank as mpirun, or srun with --mpi, tells it; None if neither started it."""
    return next((int(os.environ[name]) for name in _MPI_RANKS if name in os.environ), None)


def launcher_world_size(environment: Mapping[str, str]) -> int:
    """How many processes mpirun or srun says that it started; 0 if it says nothing."""
    sizes = (int(environment[name]) for name in _WORLD_SIZES if name in environment)
    return max(sizes, default=0)


def mpi_world() -> Any:
    """MPI's communicator of all processes (mpi4py's Intracomm).

    Raises BootstrapError if it is smaller than what the launcher started: with a launcher that the MPI
    library does not understand, each process is a world of one.
    """
    from mpi4py import MPI

    size, started = MPI.COMM_WORLD.size, launcher_world_size(os.environ)
    if size < started:
        raise BootstrapError(
            f"MPI knows of {size} process(es), but {started} were started: "
            f"{MPI.Get_library_version().splitlines()[0]} and the launcher do not speak the same language. "
            "With srun try --mpi=pmi2 for MPICH and --mpi=pmix for Open MPI (slurm.mpi in the recipe); "
            "with mpirun use the one of mpi4py's own library"
        )
    return MPI.COMM_WORLD


def _set_variables(rank: int, local: int, size: int, host: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(local),
        WORLD_SIZE=str(size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    use_interface_towards(host)


def use_interface_towards(host: str) -> None:
    """Sends collectives of this process and its children over the interface that leads to `host`.

    An interface that the user chose stays.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address = probe.getsockname()[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without = any that begins so
            return
    raise BootstrapError(f"no network interface has the address {address} that leads to {host}")


def own_address(interface: str | None = None) -> str:
    """This host's IPv4 address that other hosts reach. Raises BootstrapError.

    interface: of the recipe; by default that of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, else what the
    host's name resolves to.
    """
    interfaces = psutil.net_if_addrs()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME", "")
    if interface is None and chosen.removeprefix("=") in interfaces:
        interface = chosen.removeprefix("=")
    if interface is not None:
        if interface not in interfaces:
            known = ", ".join(sorted(interfaces))
            raise BootstrapError(f"there is no network interface {interface!r}; there are: {known}")
        for entry in interfaces[interface]:
            if entry.family == socket.AF_INET:
                return entry.address
        raise BootstrapError(f"network interface {interface!r} has no IPv4 address")
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except socket.gaierror as error:
        raise BootstrapError(f"this host's own name {name!r} does not resolve: {error}") from None
    if address.startswith("127."):
        raise BootstrapError(
            f"this host's name {name!r} stands for {address}, which no other host can reach; name the "
            "network interface to use: slurm.interface, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
    return address
