"""Starting SGLang servers on this machine, and telling the learner where they are."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from megatron_fp16rl import platform
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.recipe import TORCH_DTYPES, Dtype, Recipe, Rollout
from megatron_fp16rl.utils.cache import kernel_caches
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.processes import free_port, search_path, spawn, stop, tail

_SECRET = 0o600
_GONE = "gone"


class ServerDied(ExplainedError):
    """A rollout server ended, or never came up. The message holds its last log lines."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and what opens it. `api` may generate, only `admin` may update.

    The keys are drawn anew at each start: a server that was restarted is another endpoint.
    """

    url: str
    api: str
    admin: str


@dataclass
class Server:
    """A running server process."""

    endpoint: Endpoint
    process: subprocess.Popen
    log: Path
    scratch: Path  # its sockets, in a folder for this user's eyes only

    @property
    def healthy(self) -> bool:
        """Whether it answers /health."""
        try:
            answer = httpx.get(f"{self.endpoint.url}/health", timeout=5, trust_env=False)
            return answer.status_code == 200
        except httpx.TransportError:
            return False  # not listening yet

    def freeze_garbage(self) -> None:
        """Takes what start-up left in memory out of Python's garbage collection.

        SGLang does so after its own warm-up, which we skip; without it, a collection stops the
        scheduler for half a second in every other step.
        """
        headers = {"Authorization": f"Bearer {self.endpoint.admin}"}
        url = f"{self.endpoint.url}/freeze_gc"
        try:
            answer = httpx.post(url, headers=headers, timeout=30, trust_env=False)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ServerDied(
                f"{url} failed: {error or type(error).__name__}. Last lines of {self.log}:\n"
                f"{tail(self.log)}"
            ) from error


@dataclass(frozen=True)
class Serving:
    """What servers are started with."""

    settings: Rollout
    dtype: Dtype
    seed: int = 0
    first_device: int = 0
    nodes: int = 1  # that each server spans
    arguments: tuple[str, ...] = ()  # more of SGLang's

    @classmethod
    def of(cls, recipe: Recipe) -> "Serving":
        """The servers of a recipe: on the devices after the learner's."""
        return cls(
            recipe.rollout, recipe.precision.served, recipe.trainer.seed, recipe.learner.ranks
        )


@contextmanager
def serving(
    what: Serving, folder: Path, logs: Path, progress: Callable[[str], None]
) -> Iterator[list[Endpoint]]:
    """Servers on the weights in `folder`, healthy inside the block and gone after it."""
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as private:  # nobody else may look into it
        try:
            for index in range(what.settings.servers):
                servers.append(start(what, folder, Path(private), logs, index))
            wait_until_healthy(servers, what.settings.start_timeout_s, progress)
            yield [server.endpoint for server in servers]
        finally:
            stop_servers(servers)


def start(
    what: Serving,
    folder: Path,
    private: Path,
    logs: Path,
    index: int,
    device: int | None = None,
) -> Server:
    """Starts server `index` on the weights in `folder`. Returns at once; see `wait_until_healthy`.

    private: a folder for the key file. device: its first; by default after those of the servers
    before. The server dies with this process.
    """
    rollout, here = what.settings, platform.current()
    port = free_port(rollout.host)
    endpoint = Endpoint(
        f"http://{rollout.host}:{port}", secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    )
    keys = private / f"server-{index}.json"
    write_json(keys, {"api": endpoint.api, "admin": endpoint.admin}, mode=_SECRET)
    command = [
        sys.executable,
        "-m",
        "megatron_fp16rl.rollout.serve",
        str(keys),
        f"--model-path={folder}",
        f"--host={rollout.host}",
        f"--port={port}",
        f"--dtype={TORCH_DTYPES[what.dtype]}",
        f"--tp-size={rollout.tensor_parallel}",
        f"--random-seed={what.seed * 1000 + index}",
        *here.server_arguments(),
        *(["--enable-deterministic-inference"] if rollout.deterministic else []),
        *(["--enable-return-routed-experts"] if rollout.router_replay else []),
        *what.arguments,
        *_flags(rollout.sglang),
    ]
    log = logs / f"server_{index}.log"
    if device is None:
        device = what.first_device + index * rollout.tensor_parallel
    devices = here.server_environment(device, rollout.tensor_parallel // what.nodes)
    scratch = Path(tempfile.mkdtemp(prefix="fp16rl-server-"))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(scratch),
        "PATH": search_path(),  # SGLang compiles with ninja
        **kernel_caches(),
        **_without_proxy(rollout.host),
        **nccl.agreed(rollout),
        **devices,
    }
    return Server(endpoint, spawn(command, log, environment), log, scratch)


def _without_proxy(host: str) -> dict[str, str]:
    """No proxy stands between a server and itself, which SGLang asks over HTTP while it starts."""
    hosts = [host, "127.0.0.1", "localhost"]
    for name in ("no_proxy", "NO_PROXY"):
        hosts += os.environ.get(name, "").split(",")
    listed = ",".join(dict.fromkeys(name.strip() for name in hosts if name.strip()))
    return {"no_proxy": listed, "NO_PROXY": listed}


def stop_servers(servers: list[Server]) -> None:
    """Ends servers at once: they have nothing to save, and take five seconds over a SIGTERM."""
    left = [file for server in servers for file in _counters(server.process.pid)]
    stop([server.process for server in servers], patience_s=0)
    for server in servers:
        shutil.rmtree(server.scratch, ignore_errors=True)
    for file in left:
        file.unlink(missing_ok=True)


def _counters(pid: int) -> set[Path]:
    """SGLang's counters in /dev/shm, which a process that is killed leaves: those that this family has open.

    Their names (managers/load_snapshot.py, SGLang 0.5.23) tell of no process whose they are.
    """
    found: set[Path] = set()
    with contextlib.suppress(psutil.Error):
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                files = [Path(file.path) for file in process.open_files()]
                found |= {f for f in files if f.match("/dev/shm/sglang_loads_*.shm")}
    return found


def wait_until_healthy(
    servers: list[Server], timeout_s: float, progress: Callable[[str], None]
) -> None:
    """Returns when every server answers. Raises ServerDied with log lines if one ends or is late."""
    began = time.monotonic()
    waiting = list(servers)
    while waiting:
        for server in waiting:
            check_alive(server)
        waiting = [s for s in waiting if not s.healthy]
        elapsed = time.monotonic() - began
        if waiting and elapsed > timeout_s:
            raise ServerDied(
                f"{waiting[0].endpoint.url} did not answer /health in {timeout_s:.0f} s "
                f"(rollout.start_timeout_s). Last lines of {waiting[0].log}:\n{tail(waiting[0].log)}"
            )
        progress(f"{len(servers) - len(waiting)}/{len(servers)} servers up after {elapsed:.0f} s")
        if waiting:
            time.sleep(0.5)
    for server in servers:
        server.freeze_garbage()


def check_alive(server: Server) -> None:
    """Raises ServerDied if the process has ended."""
    code = server.process.poll()
    if code is not None:
        raise ServerDied(
            f"rollout server {server.endpoint.url} ended with code {code}. "
            f"Last lines of {server.log}:\n{tail(server.log)}"
        )


def announce(folder: Path, index: int, endpoint: Endpoint) -> None:
    """Tells the learner where a server is: a file for this user's eyes only."""
    write_json(folder / f"{index}.json", asdict(endpoint), mode=_SECRET)


def withdraw(folder: Path, index: int) -> None:
    """Takes back what `announce` said."""
    (folder / f"{index}.json").unlink(missing_ok=True)


def give_up(folder: Path) -> None:
    """Says that no server will be announced any more: all keepers have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _GONE).touch()


def given_up(folder: Path) -> bool:
    """Whether `give_up` was called."""
    return (folder / _GONE).exists()


def announced(folder: Path) -> list[Endpoint]:
    """The servers that are announced in a folder, by their numbers."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        with contextlib.suppress(FileNotFoundError):  # withdrawn just now
            found.append(Endpoint(**json.loads(path.read_text())))
    return found


def _flags(options: dict[str, object]) -> list[str]:
    """{"context_length": 4096, "log_requests": True} -> --context-length=4096 --log-requests."""
    flags = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is not False:
            flags.append(f"{flag}={value}")
    return flags
