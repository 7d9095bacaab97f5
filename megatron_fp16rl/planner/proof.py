"""Proof that what the learner's ranks export is what Hugging Face calls the model."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_fp16rl.learner.model import WholeTensors


@dataclass(frozen=True)
class Proof:
    """found: what the ranks export together. faults: each names a tensor and what is wrong with it."""

    found: WholeTensors
    faults: list[str]

    @property
    def tensors(self) -> int:
        return len(self.found)


def parameters(config: object) -> dict[str, torch.Size]:
    """Names and shapes of a model's tensors in a Hugging Face folder, as transformers writes them."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    saved = revert_weight_conversion(model, model.state_dict())
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tensor.shape for name, tensor in saved.items() if name not in tied}


def prove(exported: Iterable[WholeTensors], config: object) -> Proof:
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
