"""Who this process is among the processes of a job, and where they meet.

Whatever started it (mpirun, srun, torchrun, our local launcher), a process ends up with the variables
that torch.distributed reads: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from megatron_fp16rl.platform import nccl
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.processes import free_port

# How many processes each launcher says that it started.
_PROMISES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")
# What mpirun, or srun with --mpi, tells each process.
_MPI = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_SECRET = 0o600
_PATIENCE_S = 300.0


class BootstrapError(FinalError):
    """The processes of a job do not find each other. The message names the likely cause."""


def find_out(folder: Path, interface: str | None = None) -> bool:
    """Sets the variables unless a launcher has; says whether srun started this process itself.

    folder: the run directory; interface: of the network that the ranks are to use. Raises
    BootstrapError if nothing tells who this process is.
    """
    if "RANK" in os.environ:
        return False
    if any(name in os.environ for name in _MPI):
        from_mpi(interface)
        return False
    if "SLURM_PROCID" in os.environ:
        from_slurm(folder, interface)
        return True
    raise BootstrapError(
        "nothing says which rank this process is: start it with fp16rl train, srun, mpirun or torchrun"
    )


def from_slurm(folder: Path, interface: str | None = None, timeout_s: float = _PATIENCE_S) -> None:
    """Takes the rank from srun, meets the others by a file in the run directory, sets the variables.

    The file is of this step of this start of the job, so that none of an earlier one can be taken
    for it. Raises BootstrapError if rank 0 does not appear.
    """
    slurm = os.environ
    rank, several = int(slurm["SLURM_PROCID"]), spans_nodes(slurm)
    start = slurm.get("SLURM_RESTART_COUNT", "0")  # a requeued job keeps its number
    step = f"{slurm['SLURM_JOB_ID']}-{slurm['SLURM_STEP_ID']}"
    file = folder / "private" / f"rendezvous-{step}-{start}"
    if rank == 0:
        for old in file.parent.glob("rendezvous-*"):
            old.unlink()
        host = own_address(interface) if several or interface else "127.0.0.1"
        write_json(file, [host, free_port(host)], _SECRET)
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() > deadline:
            raise BootstrapError(
                f"rank 0 did not write {file} in {timeout_s:g} s: see its log; or the run directory "
                "is not on a file system that all nodes share"
            )
        time.sleep(0.1)
    _set(
        rank,
        int(slurm["SLURM_LOCALID"]),
        int(slurm["SLURM_STEP_NUM_TASKS"]),
        *json.loads(file.read_text()),
    )


def spans_nodes(slurm: Mapping[str, str]) -> bool:
    """Whether a job has several nodes, or components, which may be on others."""
    return int(slurm["SLURM_JOB_NUM_NODES"]) > 1 or "SLURM_HET_SIZE" in slurm


def check_ranks(ranks: int) -> None:
    """Raises BootstrapError if there are more or fewer processes than `learner.ranks`."""
    started = int(os.environ["WORLD_SIZE"])
    if started != ranks:
        raise BootstrapError(
            f"{started} processes were started, but the recipe has learner.ranks={ranks}: start "
            f"{ranks} (srun --ntasks={ranks}, mpirun -n {ranks}), or change the recipe"
        )


def from_mpi(interface: str | None = None) -> None:
    """Agrees over MPI on ranks and on a meeting point, and sets the variables.

    interface: of the network that the ranks are to use, e.g. ib0; by default what the host's name
    stands for. Rank 0's counts. Raises BootstrapError on all ranks if there is none of that name, or if
    MPI knows of fewer processes than were started.
    """
    world = mpi_world()
    hosts = world.allgather(socket.gethostname())
    meeting = error = None
    if world.rank == 0:
        several = len(set(hosts)) > 1
        try:
            host = own_address(interface) if several or interface else "127.0.0.1"
            meeting = (host, free_port(host))
        except BootstrapError as refusal:
            error = str(refusal)
    chosen = {name: os.environ[name] for name in nccl.NAMES if name in os.environ}
    meeting, error, chosen = world.bcast((meeting, error, chosen))
    if error:
        raise BootstrapError(error)
    # mpirun may carry the environment to its own host alone: rank 0's counts.
    for name in nccl.NAMES:
        os.environ.pop(name, None)
    os.environ.update(chosen)
    _set(world.rank, local_rank(hosts, world.rank), world.size, *meeting)


def mpi_world() -> object:
    """MPI's communicator of all processes. Raises BootstrapError if it has fewer than were started."""
    from mpi4py import MPI

    check_size(MPI.COMM_WORLD.size, os.environ, MPI.Get_library_version().splitlines()[0])
    return MPI.COMM_WORLD


def leave_mpi() -> None:
    """Parts from the others: mpirun takes the end of a process that did not for a crash."""
    from mpi4py import MPI

    MPI.Finalize()


def _set(rank: int, local: int, size: int, host: str, port: int) -> None:
    """The variables, and the interface that leads to rank 0's `host`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(local),
        WORLD_SIZE=str(size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    use_interface_towards(host)


def use_interface_towards(host: str) -> None:
    """Collectives of this process, and of what it starts, go that way unless the user chose another."""
    interface = interface_towards(host)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without = any that begins so


def interface_towards(host: str) -> str:
    """The network interface that carries connections to a host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        mine = probe.getsockname()[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == mine for entry in entries):
            return name
    raise BootstrapError(f"no network interface has the address {mine} that leads to {host}")


def _wanted_interface() -> str | None:
    """What the user named for gloo or NCCL, if it is one interface by its full name."""
    named = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME", "")
    named = named.removeprefix("=")
    return named if named in psutil.net_if_addrs() else None


def promised(environment: Mapping[str, str]) -> int:
    """How many processes mpirun or srun says that it started; 0 if it says nothing."""
    return max((int(environment[name]) for name in _PROMISES if name in environment), default=0)


def check_size(size: int, environment: dict[str, str], library: str) -> None:
    """Raises BootstrapError if MPI's world is smaller than the launcher promised.

    With a launcher that the MPI library does not understand, each process is a world of one.
    """
    started = promised(environment)
    if size < started:
        raise BootstrapError(
            f"MPI knows of {size} process(es), but {started} were started: {library} and the "
            "launcher do not speak the same language. With srun try --mpi=pmi2 for MPICH and "
            "--mpi=pmix for Open MPI (slurm.mpi in the recipe); with mpirun use the one of mpi4py's "
            "own library"
        )


def local_rank(hosts: Sequence[str], rank: int) -> int:
    """The number of ranks before `rank` on its host; hosts: of all ranks, in order."""
    return list(hosts[:rank]).count(hosts[rank])


def own_address(interface: str | None = None) -> str:
    """This host's address in the recipe's `interface`, else in the one that the environment names."""
    return address(interface or _wanted_interface())


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
            "network interface to use: slurm.interface, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
    return found
