"""Row layouts: the fp32 learner against transformers on several ranks, cut in each way."""

from pathlib import Path
from typing import Any

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.parallel import initialize
from megatron_fp16rl.platform.installed import kernels
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings
from megatron_fp16rl.tools.selftest import models, parity, ranks
from megatron_fp16rl.tools.selftest.result import Check, NotHere, Setting, at_most

_DENSE, _EXPERTS = models.TINY
_SEQUENCE = {"sequence_parallel": True}
_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor 2": (_DENSE, {"tensor_parallel": 2, **_SEQUENCE}),
    "pipeline 2": (_DENSE, {"pipeline_parallel": 2}),
    "context 2": (_DENSE, {"context_parallel": 2}),
    "expert 2": (_EXPERTS, {"expert_parallel": 2}),
    "data 2": (_EXPERTS, {"distributed_optimizer": True}),
}
_FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor 2, pipeline 2": (_DENSE, {"tensor_parallel": 2, "pipeline_parallel": 2, **_SEQUENCE}),
    "tensor 2, expert 2": (_EXPERTS, {"tensor_parallel": 2, "expert_parallel": 2, **_SEQUENCE}),
    "context 2, expert 2": (_EXPERTS, {"context_parallel": 2, "expert_parallel": 2}),
}


def layouts(setting: Setting) -> list[Check]:
    """Log-probs, loss and gradient norm at layouts of two ranks, and of four where there are four GPUs."""
    count = ranks.here()
    if count < 2:
        raise NotHere("layouts want 2 GPUs, 1 is here")
    chosen = {name: (2, *each) for name, each in _TWO.items()}
    chosen |= {name: (4, *each) for name, each in _FOUR.items() if count >= 4}
    if setting.quick:
        chosen = {"tensor 2": chosen["tensor 2"]}
    sequences, theirs = models.random_tokens(), {}
    for model in {model for _, model, _ in chosen.values()}:
        hf = models.hf_model(models.TINY[model], setting.folder / model)
        theirs[model] = parity.of_transformers(hf, sequences)
    checks = []
    for name, (size, model, layout) in chosen.items():
        if _needs_transformer_engine(layout):
            continue
        found = ranks.run(
            *(size, "layouts.rank", setting.folder / name),
            {"folder": str(setting.folder / model), "layout": {"ranks": size, **layout}},
        )
        checks += judge(name, theirs[model], found)
    return checks


def _needs_transformer_engine(layout: dict[str, Any]) -> bool:
    on_gpu = platform.current().NAME == "cuda"
    return on_gpu and "context_parallel" in layout and kernels() != "transformer_engine"


def rank(folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of all sequences, and the loss and the gradient norm of an update on all, on one rank."""
    settings = LearnerSettings.model_validate({**models.LEARNER, **layout})
    world = initialize(settings, seed=0)
    learner = models.learner(Path(folder), world, "fp32", parity.TEMPERATURE, settings)
    sequences = models.random_tokens()
    pi = learner.score(learner.share(Batch.from_token_ids(sequences))).pi.cpu()
    mine = sequences[world.data.rank :: world.data.size]
    outcome, loss = learner.supervised_update(learner.share(Batch.from_token_ids(mine)))
    return {"logprobs": pi.tolist(), "loss": loss, "grad_norm": outcome.grad_norm}


def judge(name: str, theirs: parity.Numbers, found: list[dict[str, Any]]) -> list[Check]:
    """The worst of all ranks."""
    apart = {"log-probs": 0.0, "loss": 0.0, "gradient norm": 0.0}
    for one in found:
        for row, exact in enumerate(theirs.logprobs):
            ours = torch.tensor(one["logprobs"][row][1 : 1 + len(exact)])
            apart["log-probs"] = max(apart["log-probs"], (ours - exact).abs().max().item())
        apart["loss"] = max(apart["loss"], abs(one["loss"] - theirs.loss))
        off = abs(one["grad_norm"] / theirs.grad_norm - 1)
        apart["gradient norm"] = max(apart["gradient norm"], off)
    return [at_most(f"{name}: {what}", value, parity.BOUND) for what, value in apart.items()]
