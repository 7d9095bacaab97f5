"""Row waits: where the host waits for the GPU, micro-batch after micro-batch."""

import ast
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

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
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sites((w.filename, w.lineno) for w in heard if _SAID in str(w.message))


def sites(lines: Iterable[tuple[str, int]]) -> Counter[str]:
    """How often each function waited, from the lines of Python that did: "learner/forward.py:run"."""
    return Counter(f"{_short(file)}:{_function(file, line)}" for file, line in lines)


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


def _function(file: str, line: int) -> str:
    """The innermost function that has the line; the line itself outside of any."""
    around = [span for span in _functions(file) if span[0] <= line <= span[1]]
    return max(around)[2] if around else str(line)


@functools.cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """First and last line, and name."""
    source = Path(file)
    tree = ast.parse(source.read_text() if source.is_file() else "")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (n.lineno, n.end_lineno or n.lineno, n.name) for n in ast.walk(tree) if isinstance(n, kinds)
    ]
