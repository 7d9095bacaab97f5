"""Child processes that never outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARENT_VARIABLE = "FP16RL_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_LOWEST_PORT = 15_000
_given: set[int] = set()


def die_with_parent() -> None:
    """Asks the kernel to SIGKILL this process when its parent dies, however the parent dies.

    Call it first thing in a child started by `spawn`. A parent that died before the call is found
    by comparing the parent's process id with the one `spawn` wrote into the environment.
    """
    expected = os.environ.pop(PARENT_VARIABLE, None)
    if expected is None:
        return  # started by hand, by torchrun or by a cluster's own launcher
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(expected):
        sys.exit("the launcher died before this process was ready")


def search_path() -> str:
    """PATH that starts with this Python's own programs (ninja is one): its environment may not be activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def spawn(
    command: list[str], log: Path, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen:
    """Starts a child in a session of its own, with its output appended to `log`.

    Own session: Ctrl-C in the terminal reaches the launcher alone, which then stops its children in
    order; and `stop` can reach the child's own children through the process group. Must be called
    from the main thread: the kernel ties the death signal to the thread that forked.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=options.pop("stdout", output),
            stderr=options.pop("stderr", output),
            env={**os.environ, **(environment or {}), PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,
            **options,
        )


def answer(
    command: Sequence[str], timeout_s: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """What a command that ends by itself prints. Raises TimeoutExpired, OSError."""
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        check=False,
        **options,
    )


def stop(children: list[subprocess.Popen], patience_s: float = 5.0) -> None:
    """Ends children and their process groups: SIGTERM, then SIGKILL after `patience_s` seconds."""
    for child in children:
        _signal_group(child, signal.SIGTERM)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
        # Also kills what a child that ended in time left behind in its group.
        _signal_group(child, signal.SIGKILL)
        child.wait()


def free_port(host: str) -> int:
    """A TCP port that nobody listens on, and that was not returned before in this process.

    It is below the kernel's range for outgoing connections: a server may take a minute to bind it, and no
    connection can occupy it until then.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(_LOWEST_PORT, first_ephemeral), 1000):
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            _given.add(port)
            return port
    raise RuntimeError(f"no free port on {host} between {_LOWEST_PORT} and {first_ephemeral}")


def local_rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torch.distributed reads, for one of `ranks` processes on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log, for an error message."""
    if not log.exists():
        return f"({log} was never written)"
    text = log.read_bytes()[-64_000:].decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _signal_group(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has gone already
        os.killpg(child.pid, number)
