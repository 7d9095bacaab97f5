"""Row shapes: what micro-batches of many sizes cost, the first time and in memory that stays."""

import random
import time

import psutil
import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most

_BATCHES, _FEW = 60, 12
_LONGEST, _SHORT = 4096, 256
_SEQUENCES = 3
_SECONDS, _HOST_MIB, _DEVICE = 30, 64, 0.1
_SPARE_MIB = 64  # torch takes memory by the piece
_MIB = 1 << 20


def shapes(setting: Setting) -> list[Check]:
    """An update on each of sixty batches of random lengths, then all of them once more."""
    on_gpu = platform.current().NAME == "cuda"
    longest = _LONGEST if on_gpu else _SHORT
    folder = setting.folder / "model"
    models.hf_model({**models.TINY["qwen3"], "max_position_embeddings": longest}, folder)
    settings = models.packing(_SEQUENCES * longest)
    learner = models.learner(folder, models.world(), "fp16", settings=settings)
    draw = random.Random(0)
    batches = []
    for _ in range(_FEW if setting.quick else _BATCHES):
        lengths = tuple(draw.randint(2, longest) for _ in range(_SEQUENCES))
        batches.append(learner.share(Batch.from_token_ids(models.random_tokens(lengths=lengths))))
    distinct = {m.shape for batch in batches for m in learner.forward.micro_batches(batch)}
    learner.supervised_update(batches[0])  # to warm up

    def seconds() -> float:
        began = time.perf_counter()
        for batch in batches:
            learner.supervised_update(batch)  # ends with a number from the device
        return time.perf_counter() - began

    first, host = seconds(), psutil.Process().memory_info().rss
    again = seconds()
    grown = (psutil.Process().memory_info().rss - host) / _MIB
    checks = [
        at_most(f"seconds that {len(distinct)} shapes cost once", first - again, _SECONDS),
        at_most("MiB of host memory that they took again", grown, _HOST_MIB),
    ]
    return [*checks, *(_device_memory() if on_gpu else [])]


def _device_memory() -> list[Check]:
    """What torch has taken from the device beyond what it ever needed."""
    needed, taken = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    limit = _DEVICE + _SPARE_MIB * _MIB / needed
    return [
        at_most(
            "device memory reserved beyond the peak of what was used", taken / needed - 1, limit
        )
    ]
