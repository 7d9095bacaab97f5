"""Where servers are: each supervisor registers its healthy server in a folder that the learner reads."""

from __future__ import annotations  # for the host of a container: launch/supervisor.py

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.utils.files import write_json

if TYPE_CHECKING:  # needs pydantic
    from megatron_fp16rl.recipe import Rollout

_ALL_FAILED = "gone"


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and its keys: `api` may generate, only `admin` may update weights.

    Each start has new keys, so a server that was restarted is another endpoint.
    """

    url: str
    api: str
    admin: str


def private_json(path: Path, value: object) -> None:
    """Writes JSON that only this user can read."""
    write_json(path, value, mode=0o600)


def register(folder: Path, index: int, endpoint: Endpoint) -> None:
    """Tells the learner where server `index` is."""
    private_json(folder / f"{index}.json", asdict(endpoint))


def deregister(folder: Path, index: int) -> None:
    (folder / f"{index}.json").unlink(missing_ok=True)


def registered(folder: Path) -> list[Endpoint]:
    endpoints = []
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        with contextlib.suppress(FileNotFoundError):  # deregistered in between
            endpoints.append(Endpoint(**json.loads(path.read_text())))
    return endpoints


def mark_all_failed(folder: Path) -> None:
    """Tells the learner that every supervisor has ended: no server will register any more."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ALL_FAILED).touch()


def all_failed(folder: Path) -> bool:
    return (folder / _ALL_FAILED).exists()


class Discovery:
    """The registered servers as rank 0 sees them, and the wait until there are enough.

    members    servers that have the weights published last
    excluded   servers that made the current publish fail; the next one tries them again
    unsure     whether a member may be lost since: then all are probed before they are used
    """

    def __init__(
        self, folder: Path, settings: Rollout, responds: Callable[[Endpoint], bool]
    ) -> None:
        """responds: whether the scheduler of a server answers; a hung server would block a whole group."""
        self.folder, self.settings, self._responds = folder, settings, responds
        self.members: list[Endpoint] = []
        self.excluded: list[Endpoint] = []
        self.unsure = False

    @property
    def timeout_s(self) -> float:
        """How long `wait` waits: at the start of a run until all servers are up, later for one."""
        settings = self.settings
        return settings.wait_for_servers_s if self.members else settings.start_timeout_s

    def has_new(self) -> bool:
        """Whether a registered server has not been sent the weights."""
        return any(endpoint not in self.members for endpoint in registered(self.folder))

    def ready(self) -> list[Endpoint] | None:
        """Servers to publish to: all of them at the start of a run, later those that are alive.

        None while there are too few and others may still come.
        """
        servers = self._alive()
        at_start = not self.members and not self.excluded
        enough = self.settings.servers if at_start else 1
        return servers if len(servers) >= enough or all_failed(self.folder) else None

    def wait(self) -> list[Endpoint]:
        """As `ready`, after a wait of at most `timeout_s`; then those that are there, if any."""
        if self.members:
            print(f"no rollout server is left: waiting {self.timeout_s:.0f} s for one", flush=True)
        deadline = time.monotonic() + self.timeout_s
        while (servers := self.ready()) is None:
            if time.monotonic() > deadline:
                return self._alive()
            time.sleep(0.2)
        return servers

    def _alive(self) -> list[Endpoint]:
        everyone = registered(self.folder)
        servers = [e for e in everyone if e not in self.excluded] or everyone
        changed = bool(self.members) and (self.unsure or servers != self.members)
        if not self.excluded and not changed:
            return servers
        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            answers = threads.map(self._responds, servers)
            servers = [e for e, alive in zip(servers, answers, strict=True) if alive]
        for endpoint in servers:
            if endpoint not in self.members:
                print(f"rollout server {endpoint.url} joins", flush=True)
        return servers
