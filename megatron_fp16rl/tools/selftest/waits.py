"""Row waits: where the host waits for the GPU, micro-batch after micro-batch."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, TextIO

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, NotHere, Setting, at_most

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

# torch's words for it: warn_or_error_on_sync in c10/cuda/CUDAFunctions.cpp.
_SAID = "called a synchronizing CUDA operation"
_TOKENS = 64
# A score and an update wait so often for each micro-batch. By reading; no GPU has counted it.
EXPECTED = {
    "data/batch.py:rows": 2,  # which sequences they are
    "learner/arrangement.py:take": 2,  # where their tokens go
    "learner/arrangement.py:predictors": 4,  # which tokens have a log-prob, and where those are
    "learner/arrangement.py:packed": 2,  # where sequences end
    "learner/nonfinite.py:inspect": 3,  # whether log-probs are finite, twice, and the loss
}


def waits(setting: Setting) -> list[Check]:
    """Steps of two and of four micro-batches: what they differ by is a micro-batch's."""
    if platform.current().NAME != "cuda":
        raise NotHere("no GPU: the host waits for nothing")
    folder = setting.folder / "model"
    models.hf_model(models.TINY["qwen3"], folder)
    learner = models.learner(folder, models.world(), "fp16", settings=models.packing(_TOKENS))
    few, many = (_counted(_step_of(learner, count)) for count in (2, 4))
    return judge(growth(few, many, 2))


def _step_of(learner: "Learner", micro_batches: int) -> Callable[[], object]:
    """A score and an update, run once before so that nothing is compiled or allocated in them."""
    sequences = models.random_tokens(lengths=(_TOKENS,) * micro_batches)
    batch = learner.share(Batch.from_token_ids(sequences))

    def step() -> None:
        learner.score(batch)
        learner.supervised_update(batch)

    step()
    return step


def _counted(step: Callable[[], object]) -> Counter[str]:
    """How often each function waited: "learner/forward.py:run"."""
    sites = Counter[str]()

    def hear(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _SAID not in str(message):
            return
        frame: FrameType | None = sys._getframe()
        while frame and (frame.f_code.co_filename, frame.f_lineno) != (filename, lineno):
            frame = frame.f_back
        while frame and frame.f_code.co_name.startswith("<"):  # a comprehension of it
            frame = frame.f_back
        sites[f"{_short(filename)}:{frame.f_code.co_name if frame else lineno}"] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = hear
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sites


def growth(few: Counter[str], many: Counter[str], micro_batches: int) -> dict[str, float]:
    """Waits for each of the micro-batches that `many` has more, of the functions that wait for them."""
    more = {site: (many[site] - few[site]) / micro_batches for site in sorted(many)}
    return {site: count for site, count in more.items() if count > 0}


def judge(found: dict[str, float]) -> list[Check]:
    """A check for each function; one that is not expected must not wait at all."""
    total = at_most("of all functions", sum(found.values()), sum(EXPECTED.values()))
    return [total, *(at_most(site, count, EXPECTED.get(site, 0)) for site, count in found.items())]


def _short(file: str) -> str:
    """From the package on."""
    for root in ("/megatron_fp16rl/", "/site-packages/"):
        if root in file:
            return file.rpartition(root)[2]
    return file
