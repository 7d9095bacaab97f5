"""Carrying weights from the learner into running SGLang servers.

`distributed`: tensors are broadcast (gloo or NCCL) in flat buckets, nothing touches the disk.
`disk`: a Hugging Face folder is written, and servers load it.
Either way the servers know the new weights under a version, and a broken-off update leaves a
version that no rollout accepts.
"""

import contextlib
import datetime
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_fp16rl import meeting, platform
from megatron_fp16rl.processes import free_port
from megatron_fp16rl.recipe import TORCH_DTYPES, Sync
from megatron_fp16rl.weights.families import served_dtype
from megatron_fp16rl.weights.folder import write_folder

_FUSED = ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")
_LET_GO_S = 5  # more than a server that is not hung waits for others in an update

Stream = Iterator[tuple[str, torch.Tensor]]


class Client(Protocol):
    """A server, as rollout.client.Client is: `post` raises unless the server agreed."""

    def post(self, path: str, body: dict, admin: bool, timeout_s: float) -> object: ...

    def let_go(self, group: str, timeout_s: float) -> bool: ...

    @property
    def responds(self) -> bool: ...


class Transport(Protocol):
    """Sends a stream of (Hugging Face name, tensor) to servers; returns the bytes sent to each."""

    def send(self, tensors: Stream, version: str, clients: Sequence[Client]) -> int:
        """Raises what a server answered, or SyncFailed: the weights of all are then undefined."""
        ...

    def survivors(self, clients: Sequence[Client]) -> list[Client]:
        """After a failure of `send`, the servers with which it can be tried again."""
        ...


class SyncFailed(RuntimeError):
    """Weights did not arrive, or not in time (`sync.timeout_s`)."""


def connect(
    settings: Sync, ranks_per_server: int, host: str, like: Path, scratch: Path, served: str
) -> Transport:
    """The transport that a recipe asks for.

    host: address of this process that the servers reach. like: the Hugging Face folder whose
    configuration the servers run; scratch: where `disk` may write; served: the servers' dtype, as a
    recipe names it.
    """
    if settings.transport == "disk":
        return DiskTransport(settings, like, scratch, served)
    return DistributedTransport(settings, ranks_per_server, host, served)


class DistributedTransport:
    """Broadcasts from this process (rank 0) to every rank of every server.

    They are in one group, which is made anew when the servers are no longer the same.
    """

    def __init__(self, settings: Sync, ranks_per_server: int, host: str, served: str) -> None:
        self.here = platform.current()
        self.here.prepare_sglang()
        self.timeout_s, self.ranks_per_server, self.host = (
            settings.timeout_s,
            ranks_per_server,
            host,
        )
        # A bucket is there twice, as tensors and as what is sent, so half the allowance is filled.
        self.bucket_bytes = (settings.bucket_mib << 20) // 2
        self.dtype = getattr(torch, TORCH_DTYPES[served])
        self.clients: list[Client] = []  # members of the group
        self.group: dist.ProcessGroup | None = None
        self._name = ""

    def send(self, tensors: Stream, version: str, clients: Sequence[Client]) -> int:
        """Between begin and end of an update, bucket by bucket; only the last carries the version."""
        if list(clients) != self.clients:
            self._regroup(clients)
        self._finish(self._post_all("/begin_weight_update", lambda _: {}))
        sent = 0
        for bucket, is_last in _buckets(tensors, self.bucket_bytes, self.dtype):
            self._send_bucket(bucket, version if is_last else f"{version}-partial")
            sent += sum(tensor.nbytes for _, tensor in bucket)
        self._finish(self._post_all("/end_weight_update", lambda _: {}))
        return sent

    def survivors(self, clients: Sequence[Client]) -> list[Client]:
        """Leaves the group, which frees those who wait in it for this process.

        Who waits for a server that is hung does not answer either, until its keeper has killed that
        one: both are left out, and come back with new weights or as new servers.
        """
        self._leave()
        patience = self.timeout_s + _LET_GO_S
        with ThreadPoolExecutor(max(1, len(clients)), "sync") as threads:
            free = list(threads.map(lambda c: c.let_go(self._name, patience), clients))
        return [client for client, is_free in zip(clients, free, strict=True) if is_free]

    def _regroup(self, clients: Sequence[Client]) -> None:
        """A group of this process and these servers. The one before is left by all who can."""
        from sglang.srt.utils import init_custom_process_group  # takes seconds: nobody waits yet

        before = [client for client in self.clients if client in clients]
        if before:
            self._leave()
            for answer in self._ask(
                before, "/destroy_weights_update_group", lambda _: {"group_name": self._name}
            ):
                answer.result()
        self.clients = list(clients)
        self._name = f"fp16rl-weights-{secrets.token_hex(4)}"
        world, port = 1 + self.ranks_per_server * len(clients), free_port(self.host)
        joining = self._post_all(
            "/init_weights_update_group",
            lambda i: {
                "master_address": self.host,
                "master_port": port,
                "rank_offset": 1 + i * self.ranks_per_server,
                "world_size": world,
                "group_name": self._name,
                "backend": self.here.COLLECTIVES,
            },
        )
        try:
            self.group = init_custom_process_group(
                backend=self.here.COLLECTIVES,
                # Under the prefix that SGLang's ranks give it.
                store=dist.PrefixStore(
                    self._name, meeting.store(self.host, port, world, True, self.timeout_s)
                ),
                world_size=world,
                rank=0,
                group_name=self._name,
                timeout=datetime.timedelta(seconds=self.timeout_s),
            )
        except (RuntimeError, OSError) as error:  # OSError: another process has taken the port
            raise SyncFailed(f"servers did not meet this process: {error}") from error
        self._finish(joining)

    def _leave(self) -> None:
        group, self.group, self.clients = self.group, None, []
        if group is not None:
            with contextlib.suppress(RuntimeError):  # what is under way in it fails
                dist.destroy_process_group(group)

    def _send_bucket(self, bucket: list[tuple[str, torch.Tensor]], version: str) -> None:
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
        receiving = self._post_all(
            "/update_weights_from_distributed",
            lambda _: {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": self._name,
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
                raise SyncFailed(f"{flat.nbytes} bytes were under way for {self.timeout_s} s")
        try:
            work.wait()
        except RuntimeError as error:  # as gloo and NCCL say it
            raise SyncFailed(f"the broadcast of weights broke off: {error}") from error
        self._finish(receiving)

    def _post_all(self, path: str, body: Callable[[int], dict]) -> list[Future]:
        return self._ask(self.clients, path, body)

    def _ask(
        self, clients: Sequence[Client], path: str, body: Callable[[int], dict]
    ) -> list[Future]:
        threads = ThreadPoolExecutor(len(clients), "sync")
        answers = [
            threads.submit(client.post, path, body(i), True, self.timeout_s)
            for i, client in enumerate(clients)
        ]
        threads.shutdown(wait=False)  # when they are done
        return answers

    @staticmethod
    def _finish(answers: list[Future]) -> None:
        for answer in answers:
            answer.result()


class DiskTransport:
    """Writes a Hugging Face folder and asks every server to load it."""

    def __init__(self, settings: Sync, like: Path, scratch: Path, served: str) -> None:
        self.timeout_s = settings.timeout_s
        self.like, self.scratch, self.served = like, scratch, TORCH_DTYPES[served]

    def send(self, tensors: Stream, version: str, clients: Sequence[Client]) -> int:
        """Returns the bytes written."""
        folder = self.scratch / f"weights-{version}"
        dtype = getattr(torch, self.served)
        cast = ((n, t.to(served_dtype(n, dtype))) for n, t in tensors)
        write_folder(folder, self.like, self.served, cast)
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}
        try:
            with ThreadPoolExecutor(len(clients), "sync") as threads:
                loading = [
                    threads.submit(
                        client.post, "/update_weights_from_disk", body, True, self.timeout_s
                    )
                    for client in clients
                ]
            for answer in loading:
                answer.result()
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        finally:
            shutil.rmtree(folder)

    def survivors(self, clients: Sequence[Client]) -> list[Client]:
        """Those that answer."""
        return [client for client in clients if client.responds]


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
