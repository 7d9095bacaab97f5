"""Keeper of one rollout server: `python -m launch.server RUN_DIR LOGS [INDEX [DEVICE HOST]]`.

Starts the server on this node, announces it to the learner when it is healthy, and starts it again when
it has died or its scheduler is silent. A restarted server has the weights of the run's beginning and new
keys: the learner takes it for a new one, and asks it nothing before it has sent it weights.
"""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from launch import bootstrap, outcome
from launch.rank import RECIPE_FILE, SERVERS
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import Recipe, load
from megatron_fp16rl.rollout import discovery
from megatron_fp16rl.rollout import server as servers
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.processes import PARENT_VARIABLE, die_with_parent, free_port, tail

_LOOK_EVERY_S = 1
_ASK_EVERY_S = 5
_LONGEST_PAUSE_S = 60
_UNPROVEN = 2  # restarts of a server that never came up: a wrong option is wrong again


@dataclass(frozen=True)
class Place:
    """Where a process of a server is.

    index     of the server
    device    first of its devices, counted on this node
    node      of a server that spans several nodes, this one's number
    nodes     that it spans
    host      this node's address, under which it listens
    in_job    whether srun started this keeper: then the end of the job ends it
    """

    index: int
    device: int
    node: int = 0
    nodes: int = 1
    host: str = "127.0.0.1"
    in_job: bool = False


def place(recipe: Recipe, index: int | None, environment: dict[str, str]) -> Place:
    """Where this keeper's server belongs: number `index` of this machine, or as srun says."""
    rollout, slurm = recipe.rollout, recipe.slurm
    if index is not None:
        return Place(
            index, recipe.learner.ranks + index * rollout.tensor_parallel, host=rollout.host
        )
    gpus = slurm.gpus_per_node if slurm else 0
    nodes = -(-rollout.tensor_parallel // gpus) if gpus else 1
    shared = slurm is None or not slurm.rollout_nodes
    first = recipe.learner.ranks // slurm.learner_nodes if slurm and shared else 0
    here = rollout.tensor_parallel // nodes
    task, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    host = rollout.host
    if bootstrap.spans_nodes(environment) and host == "127.0.0.1":
        host = bootstrap.own_address(slurm.interface if slurm else None)
    return Place(task // nodes, first + local * here, task % nodes, nodes, host, in_job=True)


def main() -> None:
    """Keeps a server until it is told to stop, or has started it too often: exit code 1."""
    in_job = PARENT_VARIABLE not in os.environ and "SLURM_STEP_ID" in os.environ
    die_with_parent()
    folder, logs = Path(sys.argv[1]), Path(sys.argv[2])
    recipe = load(folder / RECIPE_FILE)
    index = None if in_job else int(sys.argv[3])
    # Slurm asks all steps to stop at once; a server is needed until the learner has finished its step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if in_job else _leave)
    where = place(recipe, index, dict(os.environ))
    if len(sys.argv) > 4:
        where = replace(where, device=int(sys.argv[4]), host=sys.argv[5])
    bootstrap.use_interface_towards(where.host)  # as ranks do: two nodes may name theirs otherwise
    with dropped_if_unread():  # the server goes on when the disk of its log is full
        Keeper(recipe, folder, logs, where).run()


def _leave(*_: object) -> None:
    raise SystemExit(0)


class Keeper:
    """Starts, watches and restarts one server."""

    def __init__(self, recipe: Recipe, folder: Path, logs: Path, where: Place) -> None:
        self.recipe, self.folder, self.logs, self.where = recipe, folder, logs, where
        self.settings = recipe.rollout
        self.announcements = folder / SERVERS
        self.meeting = folder / "private" / f"server_{where.index}.meeting.json"
        self.weights = model_folder(recipe.model)
        self.came_up = where.node > 0  # only the first node of a server can tell

    def run(self) -> None:
        """Raises SystemExit(1) after `rollout.max_restarts` restarts; fewer if it never came up."""
        restarts = 0
        while True:
            cause = self._serve()
            if cause is None:
                return
            if restarts == self.settings.max_restarts:
                self._give_up(f"{cause}\nrollout.max_restarts={restarts} are used up")
            if restarts == _UNPROVEN and not self.came_up:
                self._give_up(f"{cause}\nit never came up in {restarts + 1} starts: given up")
            restarts += 1
            self._say(f"{cause}\nrestart {restarts} of {self.settings.max_restarts}")
            time.sleep(min(_LONGEST_PAUSE_S, 2.0 ** (restarts - 2)))

    def _give_up(self, why: str) -> None:
        self._say(why)
        raise SystemExit(1)

    def _serve(self) -> str | None:
        """One life of the server: why it ended, or None at the end of the run."""
        where = self.where
        config = replace(
            servers.ServerConfig.of(self.recipe),
            host=where.host,
            nodes=where.nodes,
            arguments=self._span(),
        )
        private = self.folder / "private"
        server = servers.start(config, self.weights, private, self.logs, where.index, where.device)
        try:
            if where.node == 0:
                self._wait_until_healthy(server)
                discovery.register(self.announcements, where.index, server.endpoint)
                self.came_up = True
                self._say(f"healthy at {server.endpoint.url}")
            return self._watch(server)
        except servers.ServerDied as death:
            return str(death)
        finally:
            if where.node == 0:
                discovery.deregister(self.announcements, where.index)
            servers.stop_servers([server])

    def _wait_until_healthy(self, server: servers.Server) -> None:
        servers.wait_until_healthy([server], self.settings.start_timeout_s, lambda _: self._look())

    def _watch(self, server: servers.Server) -> str | None:
        client = Client(server.endpoint, 5)
        asked = heard = time.monotonic()
        meeting = self._read_meeting()
        while not self._is_over():
            servers.check_alive(server)
            if self._read_meeting() != meeting:
                return "the server's first node starts anew"
            now = time.monotonic()
            if self.where.node == 0 and now - asked > _ASK_EVERY_S:
                asked = now
                if client.responds:
                    heard = time.monotonic()
                elif now - heard > self.settings.health_timeout_s:
                    return (
                        f"rollout server {server.endpoint.url} was silent for "
                        f"{now - heard:.0f} s (rollout.health_timeout_s). Last lines of "
                        f"{server.log}:\n{tail(server.log)}"
                    )
            time.sleep(_LOOK_EVERY_S)
        return None

    def _look(self) -> None:
        if self._is_over():
            raise SystemExit(0)

    def _is_over(self) -> bool:
        return self.where.in_job and (self.folder / outcome.OUTCOME).exists()

    def _span(self) -> tuple[str, ...]:
        """Arguments of a server that spans several nodes, which meet where the first one says."""
        where = self.where
        if where.nodes == 1:
            return ()
        if where.node == 0:
            write_json(self.meeting, f"{where.host}:{free_port(where.host)}", mode=0o600)
        deadline = time.monotonic() + self.settings.start_timeout_s
        while (at := self._read_meeting()) is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"the first node of server {where.index} did not say where it is")
            time.sleep(0.5)
        return (
            f"--nnodes={where.nodes}",
            f"--node-rank={where.node}",
            f"--dist-init-addr={at}",
        )

    def _read_meeting(self) -> str | None:
        if self.where.nodes == 1:
            return None
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self.meeting.read_text())
        return None

    def _say(self, line: str) -> None:
        print(f"server {self.where.index}: {line}", flush=True)


if __name__ == "__main__":
    main()
