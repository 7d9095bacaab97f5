"""A whole run under MPI: mpirun, or srun with --mpi, has started the learner ranks, one of which this is.

Rank 0 prepares the run directory and holds its lock. The first rank of each host starts the rollout servers
of that host. When a rank dies mpirun ends the others, so nothing is restarted: `--resume` goes on.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from launch import bootstrap, outcome, rank, server_supervisor
from launch.cause import rank_log
from launch.lock import HELD
from launch.server_supervisor import Placement, place
from launch.supervisor import owning
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import stop

Prepare = Callable[[int], tuple[Recipe, Path]]  # number of ranks -> resolved recipe, run directory


def run(prepare: Prepare) -> None:
    """Runs this rank to the end of the run, and ends the process. Collective over MPI's world.

    prepare: called on rank 0, so that all ranks have the same. What it raises, every rank raises.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # as under other launchers: nodes fetch nothing
    world = bootstrap.mpi_world()
    with ExitStack() as until_the_end:
        plan, error = None, None
        if world.rank == 0:
            try:
                recipe, folder = prepare(world.size)
                until_the_end.enter_context(owning(folder))
                write_text(folder / outcome.RECIPE_FILE, recipe.to_yaml())
                plan = recipe, folder, outcome.begin_attempt(folder)
                print(f"run directory: {folder}\nlogs: {plan[-1]}", flush=True)
            except Exception as raised:
                error = raised
        plan, error = world.bcast((plan, error))
        if error is not None:
            raise error
        recipe, folder, logs = plan
        os.environ[HELD] = "1"
        interface = recipe.slurm.interface if recipe.slurm else None
        bootstrap.from_mpi(interface)
        signal.signal(signal.SIGUSR1, lambda *_: outcome.ask_to_stop(folder))
        hosts = world.allgather(socket.gethostname())
        several = len(set(hosts)) > 1
        address = bootstrap.own_address(interface) if several else recipe.rollout.host
        # Errors and warnings go to a log, as under other launchers; rank 0 prints its lines here.
        with rank_log(logs, world.rank).open("ab") as log:
            for stream in (sys.stderr, sys.stdout) if world.rank else (sys.stderr,):
                os.dup2(log.fileno(), stream.fileno())
        servers = []
        try:
            if os.environ["LOCAL_RANK"] == "0":
                for where in place_servers(recipe, hosts, hosts[world.rank], address):
                    log_file = logs / f"supervisor_{where.server}.log"
                    servers.append(server_supervisor.start(folder, logs, where, log_file))
            # After an error the process ends in here, and the kernel ends its servers.
            rank.run(folder)
        finally:
            stop(servers)
    from mpi4py import MPI

    MPI.Finalize()  # mpirun takes the end of a process that did not finalize for a crash
    rank.leave()


def place_servers(recipe: Recipe, hosts: Sequence[str], host: str, address: str) -> list[Placement]:
    """The servers of `host`: all servers go over the hosts in turn. hosts: of all ranks, in order."""
    names = list(dict.fromkeys(hosts))
    indices = range(names.index(host), recipe.servers, len(names))
    return [
        place(recipe.rollout, server, local, hosts.count(host), address)
        for local, server in enumerate(indices)
    ]
