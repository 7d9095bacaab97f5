"""Transport `disk`: writes a Hugging Face folder, which every server loads."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_fp16rl.models.folder import write_folder
from megatron_fp16rl.models.spec import served_dtype
from megatron_fp16rl.recipe import TORCH_DTYPES, Dtype, Sync
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.weight_sync.base import WeightStream

_IDLE_S = 5


class DiskTransport:
    """Needs a folder that the learner and all servers see."""

    def __init__(self, settings: Sync, hf_dir: Path, scratch: Path, served: Dtype) -> None:
        self.timeout_s = settings.timeout_s
        self.hf_dir, self.scratch, self.served = hf_dir, scratch, TORCH_DTYPES[served]

    def send(self, tensors: WeightStream, version: str, servers: Sequence[Client]) -> int:
        """Returns the bytes written."""
        folder = self.scratch / f"weights-{version}"
        dtype = getattr(torch, self.served)
        cast = ((n, t.to(served_dtype(n, dtype))) for n, t in tensors)
        write_folder(folder, self.hf_dir, self.served, cast)
        # The cache holds what was computed with older weights. A server that still answers a request
        # cannot flush it: it refuses, and does not get the version's name.
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}

        def load(server: Client) -> None:
            # SGLang may run a response that it has returned for one step more, and refuse meanwhile. (The
            # other transports begin with a command of their own, which takes such a step.)
            server.wait_until_idle(_IDLE_S)
            server.post("/update_weights_from_disk", body, True, self.timeout_s)

        try:
            with ThreadPoolExecutor(len(servers), "sync") as threads:
                list(threads.map(load, servers))
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        finally:
            shutil.rmtree(folder)

    def alive(self, servers: Sequence[Client]) -> list[Client]:
        return [server for server in servers if server.responds]

    def close(self) -> None:
        """Holds nothing."""
