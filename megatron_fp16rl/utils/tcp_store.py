"""Rendezvous of process groups: a TCPStore that listens on one address.

torch's own listens on every interface, and whoever reaches it can change where ranks connect to.
"""

import datetime
import ipaddress
import os
import socket
import time

import torch.distributed as dist

_LISTEN_S = 0.5


def init_process_group(backend: str, timeout_s: float = 1800) -> None:
    """Joins torch.distributed by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    timeout, host = datetime.timedelta(seconds=timeout_s), os.environ["MASTER_ADDR"]
    if "TORCHELASTIC_RUN_ID" in os.environ or not _is_address(host):
        # torchrun has a store already; and a name may stand for another address on its own host.
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = open_store(host, int(os.environ["MASTER_PORT"]), size, rank == 0, timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def open_store(host: str, port: int, size: int, is_master: bool, timeout_s: float) -> dist.TCPStore:
    """The store at host:port, which the master serves; returns when all `size` processes are there."""
    listening = socket.create_server((host, port)).detach() if is_master else None
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, size, is_master, timeout, master_listen_fd=listening)


def release_latecomers(host: str, port: int, size: int, duration_s: float) -> None:
    """Makes processes fail that connect to host:port for a rendezvous that has failed.

    To a process that finds no store there, the store is not up yet, and it waits. So a store is opened,
    and closed on those who have connected, again and again for `duration_s`.
    """
    end = time.monotonic() + duration_s
    while time.monotonic() < end:
        listening = socket.create_server((host, port)).detach()
        store = dist.TCPStore(
            host, port, size, True, wait_for_workers=False, master_listen_fd=listening
        )
        time.sleep(_LISTEN_S)
        del store


def _is_address(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
