"""Carrying weights from the learner into running SGLang servers.

`distributed`: tensors are broadcast (gloo or NCCL) in flat buckets, nothing touches the disk.
`disk`: a Hugging Face folder is written, and servers load it.
Either way the servers know the new weights under a version, and a broken-off update leaves a
version that no rollout accepts.
"""

import datetime
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.processes import free_port
from megatron_fp16rl.recipe import TORCH_DTYPES, Sync
from megatron_fp16rl.weights.families import served_dtype
from megatron_fp16rl.weights.folder import write_folder

_FUSED = ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")

Stream = Iterator[tuple[str, torch.Tensor]]


class Client(Protocol):
    """A server, as rollout.client.Client is: `post` raises unless the server agreed."""

    def post(self, path: str, body: dict, admin: bool, timeout_s: float) -> object: ...


class Transport(Protocol):
    """Sends a stream of (Hugging Face name, tensor); returns the bytes sent."""

    def send(self, tensors: Stream, version: str) -> int: ...


class SyncTimeout(RuntimeError):
    """Weights did not arrive in time (`sync.timeout_s`)."""


def connect(
    settings: Sync,
    clients: list[Client],
    ranks_per_server: int,
    host: str,
    like: Path,
    scratch: Path,
    served: str,
) -> Transport:
    """The transport that a recipe asks for.

    like: the Hugging Face folder whose configuration the servers run; scratch: where `disk` may
    write; served: the servers' dtype, as a recipe names it.
    """
    if settings.transport == "disk":
        return DiskTransport(settings, clients, like, scratch, served)
    return DistributedTransport(settings, clients, ranks_per_server, host, served)


class DistributedTransport:
    """Broadcasts from this process (rank 0) to every rank of every server."""

    GROUP = "fp16rl-weights"

    def __init__(
        self, settings: Sync, clients: list[Client], ranks_per_server: int, host: str, served: str
    ) -> None:
        here = platform.current()
        here.prepare_sglang()
        from sglang.srt.utils import init_custom_process_group

        self.clients, self.timeout_s = clients, settings.timeout_s
        # A bucket is there twice, as tensors and as what is sent, so half the allowance is filled.
        self.bucket_bytes = (settings.bucket_mib << 20) // 2
        self.dtype = getattr(torch, TORCH_DTYPES[served])
        self._threads = ThreadPoolExecutor(len(clients), "sync")
        world, port = 1 + ranks_per_server * len(clients), free_port(host)
        joining = self._post_all(
            "/init_weights_update_group",
            lambda i: {
                "master_address": host,
                "master_port": port,
                "rank_offset": 1 + i * ranks_per_server,
                "world_size": world,
                "group_name": self.GROUP,
                "backend": here.COLLECTIVES,
            },
        )
        self.group = init_custom_process_group(
            backend=here.COLLECTIVES,
            init_method=f"tcp://{host}:{port}",
            world_size=world,
            rank=0,
            group_name=self.GROUP,
            timeout=datetime.timedelta(seconds=settings.timeout_s),
        )
        self._finish(joining)

    def send(self, tensors: Stream, version: str) -> int:
        """Between begin and end of an update, bucket by bucket; only the last carries the version."""
        self._finish(self._post_all("/begin_weight_update", lambda _: {}))
        sent = 0
        for bucket, is_last in _buckets(tensors, self.bucket_bytes, self.dtype):
            self._send_bucket(bucket, version if is_last else f"{version}-partial")
            sent += sum(tensor.nbytes for _, tensor in bucket)
        self._finish(self._post_all("/end_weight_update", lambda _: {}))
        return sent

    def _send_bucket(self, bucket: list[tuple[str, torch.Tensor]], version: str) -> None:
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
        receiving = self._post_all(
            "/update_weights_from_distributed",
            lambda _: {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": self.GROUP,
                "load_format": "flattened_bucket",
                "weight_version": version,
                "flush_cache": True,
            },
        )
        # A server that refuses never joins the broadcast: watch the answers while it is under way.
        work = dist.broadcast(flat, group=self.group, group_src=0, async_op=True)
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            done, _ = wait(receiving, timeout=0.0005, return_when=FIRST_EXCEPTION)
            for answer in done:
                answer.result()  # raises what the server said
            if time.monotonic() > deadline:
                raise SyncTimeout(f"{flat.nbytes} bytes were under way for {self.timeout_s} s")
        work.wait()
        self._finish(receiving)

    def _post_all(self, path: str, body: Callable[[int], dict]) -> list[Future]:
        return [
            self._threads.submit(client.post, path, body(i), True, self.timeout_s)
            for i, client in enumerate(self.clients)
        ]

    @staticmethod
    def _finish(answers: list[Future]) -> None:
        for answer in answers:
            answer.result()


class DiskTransport:
    """Writes a Hugging Face folder and asks every server to load it."""

    def __init__(
        self, settings: Sync, clients: list[Client], like: Path, scratch: Path, served: str
    ) -> None:
        self.clients, self.timeout_s = clients, settings.timeout_s
        self.like, self.scratch, self.served = like, scratch, TORCH_DTYPES[served]

    def send(self, tensors: Stream, version: str) -> int:
        """Returns the bytes written."""
        folder = self.scratch / f"weights-{version}"
        dtype = getattr(torch, self.served)
        cast = ((n, t.to(served_dtype(n, dtype))) for n, t in tensors)
        write_folder(folder, self.like, self.served, cast)
        for client in self.clients:
            client.post(
                "/update_weights_from_disk",
                {"model_path": str(folder), "weight_version": version, "flush_cache": True},
                admin=True,
                timeout_s=self.timeout_s,
            )
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        shutil.rmtree(folder)
        return size


def _buckets(
    tensors: Stream, limit: int, dtype: torch.dtype
) -> Iterator[tuple[list[tuple[str, torch.Tensor]], bool]]:
    """Groups a stream into buckets of at most `limit` bytes; says which bucket is the last.

    A bucket may grow larger by what stands between two tensors that SGLang 0.5.23 fuses: it drops
    the first, without a word, if the second comes with another bucket.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    size, halved = 0, False
    for name, tensor in tensors:
        tensor = tensor.to(served_dtype(name, dtype)).contiguous()
        if bucket and not halved and size + tensor.nbytes > limit:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
        if name.endswith(_FUSED):
            halved = name.endswith(_FUSED[0])
    yield bucket, True
