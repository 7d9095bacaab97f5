"""Where processes meet to form a group: a store that listens on one address.

torch's own listens on every interface, and whoever reaches it may change where ranks connect to.
"""

import datetime
import ipaddress
import os
import socket
import time

import torch.distributed as dist

_OPEN_S = 0.5


def join(backend: str, timeout_s: float = 1800) -> None:
    """Joins torch.distributed by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    timeout, host = datetime.timedelta(seconds=timeout_s), os.environ["MASTER_ADDR"]
    if "TORCHELASTIC_RUN_ID" in os.environ or not _is_address(host):
        # torchrun has a store; and a name may stand for another address on the host that bears it.
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    met = store(host, int(os.environ["MASTER_PORT"]), size, rank == 0, timeout_s)
    dist.init_process_group(backend, store=met, rank=rank, world_size=size, timeout=timeout)


def store(host: str, port: int, size: int, serves: bool, timeout_s: float) -> dist.TCPStore:
    """The store at host:port, which the process that `serves` makes; returns when all are there."""
    listening = socket.create_server((host, port)).detach() if serves else None
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, size, serves, timeout, master_listen_fd=listening)


def turn_away(host: str, port: int, size: int, patience_s: float) -> None:
    """Lets those go who come too late to a meeting at host:port that has failed, for so long.

    To a process that finds nobody there, the store is one that is not up yet; one that is lost while it
    waits in it is an error.
    """
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        listening = socket.create_server((host, port)).detach()
        here = dist.TCPStore(
            host, port, size, True, wait_for_workers=False, master_listen_fd=listening
        )
        time.sleep(_OPEN_S)
        del here  # whoever has come


def _is_address(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
