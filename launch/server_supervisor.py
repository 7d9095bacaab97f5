"""Supervisor of one rollout server: `python -m launch.server_supervisor RUN_DIR LOGS [PLACEMENT]`.

Starts the server on this node, registers it for the learner when it is healthy, and restarts it when it has
died or its scheduler is silent. A restarted server has the initial weights and new keys: the learner sends
it the current weights before it asks it anything.

PLACEMENT is JSON; without it this is a task of srun, and SLURM_* say where it is.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from launch import bootstrap, outcome
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import Recipe, Rollout, load
from megatron_fp16rl.rollout import discovery
from megatron_fp16rl.rollout import server as servers
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.processes import die_with_parent, free_port, spawn, tail

_POLL_S = 1
_HEARTBEAT_S = 5
_MAX_PAUSE_S = 60
MAX_STARTUP_RETRIES = 2  # of a server that never came up: likely a bad option


@dataclass(frozen=True)
class Placement:
    """Where a process of a rollout server runs.

    server    its number
    device    first of its devices, counted on its node
    host      address of its node, on which it listens
    part      number of this process in a server that spans `parts` nodes
    """

    server: int
    device: int
    host: str
    part: int = 0
    parts: int = 1


def place(
    rollout: Rollout, process: int, local: int, occupied: int, host: str, parts: int = 1
) -> Placement:
    """Places a process on the devices that ranks and earlier processes of its node leave.

    process: its number among all; local: among those of its node; occupied: devices of the node that
    learner ranks use; parts: nodes that one server spans.
    """
    device = occupied + local * (rollout.tensor_parallel // parts)
    return Placement(process // parts, device, host, process % parts, parts)


def place_task(recipe: Recipe, environment: Mapping[str, str]) -> Placement:
    """Places the task of srun that this process is."""
    slurm, rollout = recipe.slurm, recipe.rollout
    gpus = slurm.gpus_per_node if slurm else 0
    parts = -(-rollout.tensor_parallel // gpus) if gpus else 1
    occupied = (
        recipe.learner.ranks // slurm.learner_nodes if slurm and not slurm.rollout_nodes else 0
    )
    host = rollout.host
    if bootstrap.spans_nodes(environment) and host == "127.0.0.1":
        host = bootstrap.own_address(slurm.interface if slurm else None)
    task, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return place(rollout, task, local, occupied, host, parts)


def start(folder: Path, logs: Path, where: Placement, log: Path) -> subprocess.Popen:
    """Starts the supervisor of a server as a child of this process."""
    words = [sys.executable, "-m", "launch.server_supervisor", str(folder), str(logs)]
    return spawn([*words, json.dumps(asdict(where))], log)


def main() -> None:
    """Supervises a server until it is told to stop, or out of restarts: exit code 1."""
    is_task = len(sys.argv) == 3
    die_with_parent()
    folder, logs = Path(sys.argv[1]), Path(sys.argv[2])
    recipe = load(folder / outcome.RECIPE_FILE)
    # Slurm sends SIGTERM to all steps at once, but the learner needs the server until its step is done.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if is_task else _leave)
    where = place_task(recipe, os.environ) if is_task else Placement(**json.loads(sys.argv[3]))
    bootstrap.use_interface_towards(where.host)  # as ranks do: names may differ between nodes
    with dropped_if_unread():  # the server goes on when the disk of its log is full
        ServerSupervisor(recipe, folder, logs, where, is_task).run()


def _leave(*_: object) -> NoReturn:
    raise SystemExit(0)


class ServerSupervisor:
    """Starts, watches and restarts one server.

    until_outcome: ends when the run has an outcome, as tasks of a job do.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        logs: Path,
        where: Placement,
        until_outcome: bool = False,
    ) -> None:
        self.recipe, self.folder, self.logs, self.where = recipe, folder, logs, where
        self.settings, self.until_outcome = recipe.rollout, until_outcome
        self.registry = folder / outcome.SERVERS
        self.rendezvous = folder / "private" / f"server_{where.server}.rendezvous.json"
        self.weights = model_folder(recipe.model)
        self.came_up = where.part > 0  # only the first node of a server can tell

    def run(self) -> None:
        """Raises SystemExit(1) after `rollout.max_restarts` restarts; sooner if it never came up."""
        restarts = 0
        while True:
            reason = self._serve()
            if reason is None:
                return
            if restarts == self.settings.max_restarts:
                self._say(f"{reason}\nrollout.max_restarts={restarts} are used up")
                raise SystemExit(1)
            if restarts == MAX_STARTUP_RETRIES and not self.came_up:
                self._say(f"{reason}\nit never came up in {restarts + 1} starts: given up")
                raise SystemExit(1)
            restarts += 1
            self._say(f"{reason}\nrestart {restarts} of {self.settings.max_restarts}")
            time.sleep(min(_MAX_PAUSE_S, 2.0 ** (restarts - 2)))

    def _serve(self) -> str | None:
        """Runs the server once. Returns the failure reason, or None when the run is over."""
        where = self.where
        config = replace(
            servers.ServerConfig.of(self.recipe),
            host=where.host,
            nodes=where.parts,
            arguments=self._node_arguments(),
        )
        private = self.folder / "private"
        server = servers.start(config, self.weights, private, self.logs, where.server, where.device)
        try:
            if where.part == 0:
                timeout_s = self.settings.start_timeout_s
                servers.wait_until_healthy([server], timeout_s, lambda _: self._end_with_run())
                discovery.register(self.registry, where.server, server.endpoint)
                self.came_up = True
                self._say(f"healthy at {server.endpoint.url}")
            return self._watch(server)
        except servers.ServerDied as death:
            return str(death)
        finally:
            if where.part == 0:
                discovery.deregister(self.registry, where.server)
            servers.stop_servers([server])

    def _watch(self, server: servers.Server) -> str | None:
        client = Client(server.endpoint, 5)
        last_request = last_response = time.monotonic()
        rendezvous = self._read_rendezvous()
        while not self._is_over():
            servers.check_alive(server)
            if self._read_rendezvous() != rendezvous:
                return "the server's first node restarts"
            now = time.monotonic()
            if self.where.part == 0 and now - last_request > _HEARTBEAT_S:
                last_request = now
                if client.responds:
                    last_response = time.monotonic()
                elif now - last_response > self.settings.health_timeout_s:
                    return (
                        f"rollout server {server.endpoint.url} was silent for "
                        f"{now - last_response:.0f} s (rollout.health_timeout_s). Last lines of "
                        f"{server.log}:\n{tail(server.log)}"
                    )
            time.sleep(_POLL_S)
        return None

    def _end_with_run(self) -> None:
        if self._is_over():
            raise SystemExit(0)

    def _is_over(self) -> bool:
        return self.until_outcome and (self.folder / outcome.OUTCOME).exists()

    def _node_arguments(self) -> tuple[str, ...]:
        """SGLang's arguments of a server that spans nodes: its first node says where they meet."""
        where = self.where
        if where.parts == 1:
            return ()
        if where.part == 0:
            write_json(self.rendezvous, f"{where.host}:{free_port(where.host)}", mode=0o600)
        deadline = time.monotonic() + self.settings.start_timeout_s
        while (address := self._read_rendezvous()) is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"the first node of server {where.server} did not say where it is")
            time.sleep(_POLL_S)
        spread = (f"--nnodes={where.parts}", f"--node-rank={where.part}")
        return (*spread, f"--dist-init-addr={address}")

    def _read_rendezvous(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self.rendezvous.read_text())
        return None

    def _say(self, line: str) -> None:
        print(f"server {self.where.server}: {line}", flush=True)


if __name__ == "__main__":
    main()
