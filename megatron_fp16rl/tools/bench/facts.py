"""What a result was measured on: a number without its machine says nothing."""

import datetime
import importlib.metadata
import os
import platform as python
import socket

from launch.preflight import PACKAGES
from megatron_fp16rl import platform


def facts() -> dict[str, object]:
    """Of this machine, and the hosts of all ranks if there are some. Collective if so."""
    import torch
    import torch.distributed as dist

    host = socket.gethostname()
    hosts = [host] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(hosts, host)
    versions = {"python": python.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.current().describe(),
        "versions": versions,
        "hosts": hosts,  # of each rank
        "cpus": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "load": os.getloadavg()[0],  # what else ran in the last minute, this benchmark included
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
