"""A whole run under MPI: `mpirun -n 4 fp16rl-learner RECIPE`. Every process is a learner rank.

Rank 0 makes the run directory; the first rank of each host starts the rollout servers that fall on
that host, and ends them. When a rank dies, mpirun ends the others: `--resume` goes on from the last
checkpoint.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch import bootstrap, local, lock, outcome, rank, status
from launch.cause import rank_log
from launch.paths import absolute
from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, Overrides, fail, load_recipe
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import spawn, stop


@dataclass(frozen=True)
class Place:
    """Where a rollout server is to run: its first device, counted on its host."""

    index: int
    host: str
    device: int


def deal(servers: int, tensor_parallel: int, hosts: Sequence[str]) -> list[Place]:
    """Servers over hosts in turn, on the devices after those of the ranks.

    hosts: of all ranks, in order.
    """
    names = list(dict.fromkeys(hosts))
    free = {name: hosts.count(name) for name in names}
    places = []
    for index in range(servers):
        name = names[index % len(names)]
        places.append(Place(index, name, free[name]))
        free[name] += tensor_parallel
    return places


def learner(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, e.g. recipes/tiny/dense-grpo-fp16.yaml")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run from its newest checkpoint.")
    ] = None,
) -> None:
    """Run a recipe on the processes that mpirun, or srun with --mpi, starts: learner.ranks of them.

    Examples:

        mpirun -n 2 fp16rl-learner recipes/tiny/dense-grpo-fp16.yaml

        srun --mpi=pmi2 --ntasks=16 fp16rl-learner recipes/mine.yaml --set trainer.steps=100
    """
    if (recipe is None) == (resume is None):
        fail("give either a recipe or --resume RUN_DIRECTORY", BAD_RECIPE)
    os.environ["HF_HUB_OFFLINE"] = "1"  # as under other launchers: nodes fetch nothing
    try:
        world = bootstrap.mpi_world()
    except bootstrap.BootstrapError as error:
        fail(str(error), FAILED)
    with contextlib.ExitStack() as until_the_end:
        # Rank 0 alone looks, so that all have the same; and all hear of it if it cannot go on.
        found = error = None
        if world.rank == 0:
            try:
                resolved, folder = _prepare(recipe, overrides or [], resume, world.size)
                until_the_end.enter_context(lock.alone_in(folder))
                os.environ[lock.HELD] = "1"
                found = (resolved, folder, _begin(resolved, folder))
            except (RecipeError, lock.RunInUse, local.Unwritable) as refusal:
                error = (str(refusal), BAD_RECIPE)
            except typer.Exit as refusal:  # it has been said
                error = ("", refusal.exit_code)
        found, error = world.bcast((found, error))
        if error:
            if world.rank == 0 and error[0]:
                fail(*error)
            raise typer.Exit(error[1])
        resolved, folder, logs = found
        interface = resolved.slurm.interface if resolved.slurm else None
        try:
            bootstrap.from_mpi(interface)
        except bootstrap.BootstrapError as refusal:
            if world.rank == 0:
                fail(str(refusal), FAILED)
            raise typer.Exit(FAILED) from None
        signal.signal(signal.SIGUSR1, lambda *_: outcome.ask_to_stop(folder))
        hosts = world.allgather(socket.gethostname())
        mine = [] if int(os.environ["LOCAL_RANK"]) else _places(resolved, hosts, hosts[world.rank])
        _write_to(rank_log(logs, world.rank), world.rank > 0)
        host = bootstrap.own_address(interface) if len(set(hosts)) > 1 else resolved.rollout.host
        with _keepers(mine, folder, logs, host):
            rank.run(folder)  # leaves at once, and takes its keepers along, if it fails
    bootstrap.leave_mpi()
    rank.leave()


def _prepare(
    path: Path | None, overrides: list[str], resume: Path | None, ranks: int
) -> tuple[Recipe, Path]:
    """The resolved recipe and the run directory."""
    recipe = absolute(load_recipe(path or resume / rank.RECIPE_FILE, overrides))
    if recipe.learner.ranks != ranks:
        raise RecipeError(
            f"MPI started {ranks} processes, the recipe has learner.ranks={recipe.learner.ranks}; "
            f"start that many, or say --set learner.ranks={ranks}"
        )
    model_folder(recipe.model)
    if resume is not None:
        status.check_free(*status.read([resume.resolve()]))
        return recipe, resume.resolve()
    return recipe, local.new_run_folder(Path(recipe.trainer.run_root), recipe.name).resolve()


def _begin(recipe: Recipe, folder: Path) -> Path:
    """Writes the recipe down; returns the folder for the logs of this start."""
    (folder / "private").mkdir(mode=0o700, exist_ok=True)
    outcome.clear(folder)
    logs = outcome.begin_attempt(folder)
    for place in (folder, logs):
        write_text(place / rank.RECIPE_FILE, recipe.to_yaml())
    print(f"run directory: {folder}\nlogs: {logs}", flush=True)
    return logs


def _write_to(log: Path, everything: bool) -> None:
    """Errors and warnings go to a log, as under other launchers; of rank 0 no more than that."""
    with log.open("ab") as file:
        for stream in (sys.stderr, sys.stdout) if everything else (sys.stderr,):
            os.dup2(file.fileno(), stream.fileno())


def _places(recipe: Recipe, hosts: Sequence[str], host: str) -> list[Place]:
    servers = 0 if recipe.rollout.replay else recipe.rollout.servers
    places = deal(servers, recipe.rollout.tensor_parallel, hosts)
    return [place for place in places if place.host == host]


@contextlib.contextmanager
def _keepers(places: Sequence[Place], folder: Path, logs: Path, host: str) -> Iterator[None]:
    """Keepers of the servers that fall on this host, which die with this process.

    host: its address, for the servers.
    """
    keepers: list[subprocess.Popen] = []
    try:
        for place in places:
            command = [sys.executable, "-m", "launch.server", str(folder), str(logs)]
            where = [str(place.index), str(place.device), host]
            log = logs / f"keeper_{place.index}.log"
            keepers.append(spawn([*command, *where], log))
        yield
    finally:
        stop(keepers)


def main() -> None:
    """The `fp16rl-learner` command."""
    typer.run(learner)


if __name__ == "__main__":
    main()
