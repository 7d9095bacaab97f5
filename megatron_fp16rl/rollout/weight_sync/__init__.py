"""Carrying the learner's weights into running SGLang servers. Each transport is one file."""

from pathlib import Path

import torch

from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.spec import family_of
from megatron_fp16rl.recipe import TORCH_DTYPES, Dtype, Sync
from megatron_fp16rl.rollout.weight_sync.base import Transport
from megatron_fp16rl.rollout.weight_sync.broadcast import BroadcastTransport
from megatron_fp16rl.rollout.weight_sync.disk import DiskTransport


def connect(
    settings: Sync,
    ranks_per_server: int,
    host: str,
    hf_dir: Path,
    scratch: Path,
    served: Dtype,
) -> Transport:
    """Rank 0's transport.

    host: address of this process that the servers can reach. hf_dir: the Hugging Face folder whose
    configuration the servers run. scratch: where `disk` may write. served: the servers' dtype.
    """
    if settings.transport == "disk":
        return DiskTransport(settings, hf_dir, scratch, served)
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[served])
    fused = family_of(load_config(hf_dir)).fused_by_sglang
    return BroadcastTransport(settings, ranks_per_server, host, dtype, fused)
