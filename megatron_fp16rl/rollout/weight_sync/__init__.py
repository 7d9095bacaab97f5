"""Carrying the learner's weights into running SGLang servers. Each transport is one file."""

from pathlib import Path

import torch

from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.spec import family_of
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import TORCH_DTYPES, Dtype, Sync
from megatron_fp16rl.rollout.weight_sync.base import FromRank0, Sender, Transport
from megatron_fp16rl.rollout.weight_sync.broadcast import BroadcastTransport
from megatron_fp16rl.rollout.weight_sync.disk import DiskTransport
from megatron_fp16rl.rollout.weight_sync.sliced import SlicedTransport


def connect(
    settings: Sync,
    ranks_per_server: int,
    host: str,
    hf_dir: Path,
    scratch: Path,
    served: Dtype,
    world: World,
) -> Transport:
    """This rank's end of a transport.

    host: address of rank 0 that the servers can reach. hf_dir: the Hugging Face folder whose
    configuration the servers run. scratch: where `disk` may write. served: the servers' dtype.
    """
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[served])
    if settings.transport == "sliced":
        return SlicedTransport(settings, ranks_per_server, host, dtype, world)
    sender: Sender | None = None
    if world.is_rank0 and settings.transport == "disk":
        sender = DiskTransport(settings, hf_dir, scratch, served)
    elif world.is_rank0:
        fused = family_of(load_config(hf_dir)).fused_by_sglang
        sender = BroadcastTransport(settings, ranks_per_server, host, dtype, fused)
    return FromRank0(world, sender, (settings.bucket_mib << 20) // 3)
