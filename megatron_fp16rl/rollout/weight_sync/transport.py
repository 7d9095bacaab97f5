"""Carrying weights from the learner into running SGLang servers.

`distributed`: tensors are broadcast (gloo or NCCL) in flat buckets, nothing touches the disk.
`disk`: a Hugging Face folder is written, and servers load it.
Either way the servers know the new weights under a version, and a broken-off update leaves a
version that no rollout accepts.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.models.families import served_dtype
from megatron_fp16rl.models.folder import write_folder
from megatron_fp16rl.recipe import TORCH_DTYPES, Sync
from megatron_fp16rl.rollout.weight_sync.group import Client, Group, finish, in_thread

_FUSED = ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")
# What checkpoints of old have beside their weights; SGLang's models pass over it.
_NO_WEIGHT = "model.layers.0.self_attn.rotary_emb.inv_freq"
_LET_GO_S = 5  # more than a server that is not hung waits for others in an update

Stream = Iterator[tuple[str, torch.Tensor]]
Bucket = list[tuple[str, torch.Tensor]]


class Transport(Protocol):
    """Sends a stream of (Hugging Face name, tensor) to servers; returns the bytes sent to each."""

    def send(self, tensors: Stream, version: str, clients: Sequence[Client]) -> int:
        """Raises what a server answered, or SyncFailed: the weights of all are then undefined."""
        ...

    def survivors(self, clients: Sequence[Client]) -> list[Client]:
        """After a failure of `send`, the servers with which it can be tried again."""
        ...

    def close(self) -> None:
        """Lets the servers go. Not for a run that ends: it leaves, and they end with it."""
        ...


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
        platform.current().prepare_sglang()
        self.timeout_s, self.ranks_per_server, self.host = (
            settings.timeout_s,
            ranks_per_server,
            host,
        )
        # A bucket is there twice, as tensors and as what is sent, so half the allowance is filled.
        self.bucket_bytes = (settings.bucket_mib << 20) // 2
        self.dtype = getattr(torch, TORCH_DTYPES[served])
        self.group: Group | None = None

    def send(self, tensors: Stream, version: str, clients: Sequence[Client]) -> int:
        """Between begin and end of an update, bucket by bucket; only the last carries the version."""
        is_new = self.group is None or list(clients) != self.group.clients
        group = self._regroup(clients) if is_new else self.group
        finish(group.ask("/begin_weight_update"))
        if is_new:
            # NCCL makes its communicator now. A server without memory for a bucket, say, would never
            # come to that; for this one everybody has.
            nothing = torch.zeros(1, dtype=self.dtype, device=platform.current().device())
            self._send_bucket([(_NO_WEIGHT, nothing)], f"{version}-partial", False)
        sent = 0
        for bucket, is_last in _buckets(tensors, self.bucket_bytes, self.dtype):
            self._send_bucket(bucket, version if is_last else f"{version}-partial", is_last)
            sent += sum(tensor.nbytes for _, tensor in bucket)
        finish(group.ask("/end_weight_update"))
        return sent

    def survivors(self, clients: Sequence[Client]) -> list[Client]:
        """Leaves the group, which frees those who wait in it for this process.

        Who waits for a server that is hung does not answer either, until its supervisor has killed that
        one: both are left out, and come back with new weights or as new servers.
        """
        group, self.group = self.group, None
        group.forget()
        patience = self.timeout_s + _LET_GO_S
        asked = [in_thread(lambda c=client: c.let_go(group.name, patience)) for client in clients]
        return [client for client, answer in zip(clients, asked, strict=True) if answer.result()]

    def close(self) -> None:
        """Leaves the group together with its servers."""
        group, self.group = self.group, None
        if group is not None:
            group.part(group.clients)

    def _regroup(self, clients: Sequence[Client]) -> Group:
        """A group of this process and these servers. The one before is left by all who can."""
        if self.group is not None:
            self.group.part([client for client in self.group.clients if client in clients])
        self.group = Group(clients, self.ranks_per_server, self.host, self.timeout_s)
        self.group.meet()
        return self.group

    def _send_bucket(self, bucket: Bucket, version: str, is_last: bool) -> None:
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
        receiving = self.group.ask(
            "/update_weights_from_distributed",
            lambda _: {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": self.group.name,
                "load_format": "flattened_bucket",
                "weight_version": version,
                # What was computed with older weights. A server that cannot, for it still answers
                # somebody, refuses, and does not get the version's name.
                "flush_cache": is_last,
            },
        )
        self.group.broadcast(flat, receiving)
        finish(receiving)


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

    def close(self) -> None:
        """Nothing holds them."""


def _buckets(tensors: Stream, limit: int, dtype: torch.dtype) -> Iterator[tuple[Bucket, bool]]:
    """Groups a stream into buckets of at most `limit` bytes; says which bucket is the last.

    A bucket may grow larger by what stands between two tensors that SGLang 0.5.23 fuses: it drops
    the first, without a word, if the second comes with another bucket.
    """
    bucket: Bucket = []
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
