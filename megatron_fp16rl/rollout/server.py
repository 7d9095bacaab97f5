"""Starts and stops SGLang servers on this machine; `discovery` tells the learner where they are."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from megatron_fp16rl import platform
from megatron_fp16rl.models.config import load_config, read_object
from megatron_fp16rl.models.families import family_named
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.recipe import TORCH_DTYPES, Dtype, Head, Recipe
from megatron_fp16rl.rollout.discovery import Endpoint, private_json
from megatron_fp16rl.utils.cache import kernel_caches
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.processes import free_port, search_path, spawn, stop, tail

Progress = Callable[[str], None]

LOADER = "megatron_fp16rl.rollout.weight_sync.loader.load"  # what SGLang may call with new weights


class ServerDied(ExplainedError):
    """A rollout server ended, or never came up. The message holds its last log lines."""


@dataclass
class Server:
    """A running server process."""

    endpoint: Endpoint
    process: subprocess.Popen
    log: Path
    scratch: Path  # its sockets, in a folder that only this user can read

    @property
    def healthy(self) -> bool:
        try:
            answer = httpx.get(f"{self.endpoint.url}/health", timeout=5, trust_env=False)
            return answer.status_code == 200
        except httpx.TransportError:
            return False  # not listening yet

    def freeze_garbage(self) -> None:
        """Excludes the objects of start-up from Python's garbage collection.

        SGLang does so after its own warm-up, which is skipped here; without it, a collection stops the
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
class ServerConfig:
    """How a server runs; a recipe is not needed for it.

    dtype            of weights and activations
    head             fp32: logits are fp32 products of these
    tensor_parallel  its ranks, over all of its nodes
    nodes            that it spans; `arguments` then tell it where the others are
    sglang           options of sglang.launch_server, as `rollout.sglang` has them
    """

    dtype: Dtype
    tensor_parallel: int = 1
    host: str = "127.0.0.1"
    deterministic: bool = False
    router_replay: bool = False  # whether it returns the experts of each token
    sglang: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    start_timeout_s: float = 1800
    nodes: int = 1
    arguments: tuple[str, ...] = ()
    head: Head = None

    @classmethod
    def of(cls, recipe: Recipe) -> "ServerConfig":
        rollout = recipe.rollout
        return cls(
            recipe.precision.served,
            rollout.tensor_parallel,
            rollout.host,
            rollout.deterministic,
            rollout.router_replay,
            rollout.sglang,
            recipe.trainer.seed,
            rollout.start_timeout_s,
            head=recipe.precision.head,
        )


@contextmanager
def launch_servers(
    config: ServerConfig,
    weights: Path,
    logs: Path,
    count: int = 1,
    first_device: int = 0,
    progress: Progress = lambda _: None,
) -> Iterator[list[Server]]:
    """`count` servers of a Hugging Face folder, healthy inside the block and gone after it."""
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as private:  # mode 0700: it holds the keys
        try:
            for index in range(count):
                device = first_device + index * config.tensor_parallel
                servers.append(start(config, weights, Path(private), logs, index, device))
            wait_until_healthy(servers, config.start_timeout_s, progress)
            yield servers
        finally:
            stop_servers(servers)


def start(
    config: ServerConfig, weights: Path, private: Path, logs: Path, index: int = 0, device: int = 0
) -> Server:
    """Starts server number `index`. Returns at once; see `wait_until_healthy`.

    weights: a Hugging Face folder. private: a folder for the key file. device: the first that it
    uses on this node. The server dies with this process.
    """
    current = platform.current()
    port = free_port(config.host)
    # New keys for each start: a server that was restarted is another one to the learner.
    endpoint = Endpoint(
        f"http://{config.host}:{port}", secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    )
    keys = private / f"server-{index}.json"
    private_json(keys, {"api": endpoint.api, "admin": endpoint.admin})
    command = [
        *(sys.executable, "-m", "megatron_fp16rl.rollout.serve", str(keys)),
        f"--model-path={weights}",
        f"--host={config.host}",
        f"--port={port}",
        f"--dtype={TORCH_DTYPES[config.dtype]}",
        f"--tp-size={config.tensor_parallel}",
        f"--random-seed={(config.seed * 1000 + index) % 2**32}",  # a date is a seed; NumPy takes no larger ones
        f"--custom-weight-loader={LOADER}",
        *(flag for flag in current.server_arguments() if flag not in _switched_off(config.sglang)),
        *(["--enable-deterministic-inference"] if config.deterministic else []),
        *(["--enable-return-routed-experts"] if config.router_replay else []),
        *(["--enable-fp32-lm-head"] if config.head else []),
        *config.arguments,
        *_served_as(weights),
        *_flags(config.sglang),
    ]
    scratch = Path(tempfile.mkdtemp(prefix="fp16rl-server-"))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(scratch),
        "PATH": search_path(),  # SGLang compiles with ninja
        # The last inputs of a convolution wait for the next token in bf16 otherwise.
        "SGLANG_MAMBA_CONV_DTYPE": TORCH_DTYPES[config.dtype],
        **kernel_caches(),
        **_without_proxy(config.host),
        **nccl.agreed(config),
        **current.server_environment(device, config.tensor_parallel // config.nodes),
    }
    log = logs / f"server_{index}.log"
    return Server(endpoint, spawn(command, log, environment), log, scratch)


def _served_as(weights: Path) -> list[str]:
    """Keys of the folder's config.json as SGLang reads them; see Family.served_as."""
    values = read_object(weights / "config.json")
    family = family_named(values.get("model_type"), values.get("architectures"))
    if family is None or family.served_as is None or values.get("quantization_config"):
        return []
    return [f"--json-model-override-args={json.dumps(family.served_as(load_config(weights)))}"]


def _without_proxy(host: str) -> dict[str, str]:
    """No proxy for the server's own address: SGLang sends requests to itself while it starts."""
    hosts = [host, "127.0.0.1", "localhost"]
    for name in ("no_proxy", "NO_PROXY"):
        hosts += os.environ.get(name, "").split(",")
    listed = ",".join(dict.fromkeys(name.strip() for name in hosts if name.strip()))
    return {"no_proxy": listed, "NO_PROXY": listed}


def stop_servers(servers: list[Server]) -> None:
    """Kills servers: they have nothing to save, and take five seconds to end on SIGTERM."""
    counters = [file for server in servers for file in _counters(server.process.pid)]
    stop([server.process for server in servers], patience_s=0)
    for server in servers:
        shutil.rmtree(server.scratch, ignore_errors=True)
    for file in counters:
        file.unlink(missing_ok=True)


def _counters(pid: int) -> set[Path]:
    """The files in /dev/shm that the processes of a server have open, and leave behind when killed.

    Their names (managers/load_snapshot.py, SGLang 0.5.23) do not say whose they are.
    """
    counters: set[Path] = set()
    with contextlib.suppress(psutil.Error):
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                files = [Path(file.path) for file in process.open_files()]
                counters |= {f for f in files if f.match("/dev/shm/sglang_loads_*.shm")}
    return counters


def wait_until_healthy(servers: list[Server], timeout_s: float, progress: Progress) -> None:
    """Returns when every server is up. Raises ServerDied with log lines if one ends or is late."""
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


def _switched_off(options: Mapping[str, object]) -> set[str]:
    """Flags of the platform's that a recipe sets to false."""
    return {f"--{key.replace('_', '-')}" for key, value in options.items() if value is False}


def _flags(options: Mapping[str, object]) -> list[str]:
    """{"context_length": 4096, "log_requests": True} -> --context-length=4096 --log-requests."""
    flags = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is not False:
            flags.append(f"{flag}={value}")
    return flags
