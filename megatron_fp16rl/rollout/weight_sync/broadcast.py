"""Transport `distributed`: broadcasts flat buckets from rank 0 to every rank of every server.

gloo or NCCL; nothing touches the disk.
"""

from collections.abc import Iterator, Sequence

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.models.spec import served_dtype
from megatron_fp16rl.recipe import Sync
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.weight_sync.base import WeightStream
from megatron_fp16rl.rollout.weight_sync.group import Group, finish

# Old checkpoints have this tensor beside their weights; SGLang's models ignore it.
_IGNORED = "model.layers.0.self_attn.rotary_emb.inv_freq"

Bucket = list[tuple[str, torch.Tensor]]


class BroadcastTransport:
    """This process (rank 0) and all servers are one process group, recreated when the servers change."""

    def __init__(
        self,
        settings: Sync,
        ranks_per_server: int,
        host: str,
        dtype: torch.dtype,
        fused: tuple[str, ...] = (),
    ) -> None:
        """host: as `connect` has it; dtype: the servers'; fused: see Family.fused_by_sglang."""
        platform.current().prepare_sglang()
        self.timeout_s, self.ranks_per_server = settings.timeout_s, ranks_per_server
        self.host, self.dtype, self.fused = host, dtype, fused
        # A bucket is held twice, as tensors and flat, beside as much that the next is gathered from.
        self.bucket_bytes = (settings.bucket_mib << 20) // 3
        self.group: Group | None = None

    def send(self, tensors: WeightStream, version: str, servers: Sequence[Client]) -> int:
        """See Transport."""
        # 1. One process group with exactly these servers, kept from sync to sync: a broadcast takes
        #    every member, so one that is gone, or new, needs another group.
        group, is_new = self.group, False
        if group is None or list(servers) != group.servers:
            group, is_new = self._new_group(servers), True
        # 2. Opens an update on every server: what SGLang repacked after loading is brought back into the
        #    shape in which it can be loaded. A server in an unfinished update refuses here.
        finish(group.post_all("/begin_weight_update"))
        if is_new:
            # NCCL builds its communicator in the first broadcast. A server without memory for a whole
            # bucket would never join it; for this one element every server has memory.
            nothing = torch.zeros(1, dtype=self.dtype, device=platform.current().device())
            self._send_bucket(group, [(_IGNORED, nothing)], f"{version}-partial", False)
        # 3. Bucket by bucket: neither side holds a second copy of the model. Only the last carries the
        #    version, so that a server with half of the weights is never taken for one that has all.
        sent = 0
        for bucket, is_last in buckets(tensors, self.bucket_bytes, self.dtype, self.fused):
            self._send_bucket(group, bucket, version if is_last else f"{version}-partial", is_last)
            sent += sum(tensor.nbytes for _, tensor in bucket)
        # 4. Closes it: the servers repack their weights. An error of any of them is raised.
        finish(group.post_all("/end_weight_update"))
        return sent

    def alive(self, servers: Sequence[Client]) -> list[Client]:
        """See Transport."""
        group, self.group = self.group, None
        if group is None:
            return [server for server in servers if server.responds]
        return group.abandon(servers)

    def close(self) -> None:
        """Leaves the group together with its servers."""
        group, self.group = self.group, None
        if group is not None:
            group.leave(group.servers)

    def _new_group(self, servers: Sequence[Client]) -> Group:
        """A group of this process and these servers. All that still can leave the previous one."""
        if self.group is not None:
            self.group.leave([server for server in self.group.servers if server in servers])
        # Assigned before it forms: after a failure `alive` must abandon it.
        self.group = Group(servers, self.ranks_per_server, self.host, self.timeout_s)
        self.group.form()
        return self.group

    def _send_bucket(self, group: Group, bucket: Bucket, version: str, is_last: bool) -> None:
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
        receiving = group.post_all(
            "/update_weights_from_distributed",
            lambda _: {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": group.name,
                "load_format": "flattened_bucket",
                "weight_version": version,
                # The cache holds what was computed with older weights. A server that still answers
                # a request cannot flush it: it refuses, and does not get the version's name.
                "flush_cache": is_last,
            },
        )
        group.broadcast(flat, receiving)
        finish(receiving)


def buckets(
    tensors: WeightStream, limit: int, dtype: torch.dtype, fused: tuple[str, ...]
) -> Iterator[tuple[Bucket, bool]]:
    """Groups a stream into buckets of at most `limit` bytes; says which bucket is the last.

    A bucket grows beyond it until all parts of a fused weight are in: SGLang 0.5.23 silently drops a
    part whose other parts come with another bucket. fused: the name endings of the parts, in order.
    """
    bucket: Bucket = []
    size, incomplete = 0, False
    for name, tensor in tensors:
        tensor = tensor.to(served_dtype(name, dtype)).contiguous()
        if bucket and not incomplete and size + tensor.nbytes > limit:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
        if fused and name.endswith(fused):
            incomplete = not name.endswith(fused[-1])
    yield bucket, True
