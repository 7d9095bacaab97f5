"""Proof that what the learner's ranks export is what Hugging Face calls the model."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_fp16rl.learner.model import HFTensors
from megatron_fp16rl.models.check import parameters


@dataclass(frozen=True)
class Proof:
    """found: what the ranks export together. faults: each names a tensor and what is wrong with it."""

    found: HFTensors
    faults: list[str]

    @property
    def tensors(self) -> int:
        return len(self.found)


def prove(exported: Iterable[HFTensors], config: object) -> Proof:
    """Holds the export of all pipeline stages against transformers' own model of the same shape."""
    wanted = parameters(config)
    found = [tensor for tensors in exported for tensor in tensors]
    shapes = dict(found)
    times = Counter(name for name, _ in found)
    faults = [f"{name} is exported {n} times" for name, n in times.items() if n > 1]
    faults += [f"{name} is not exported" for name in wanted if name not in shapes]
    faults += [f"{name} is unknown to transformers" for name in shapes if name not in wanted]
    faults += [
        f"{name} is exported as {tuple(shape)}, but is {tuple(wanted[name])}"
        for name, shape in shapes.items()
        if name in wanted and shape != wanted[name]
    ]
    return Proof(found, faults)
