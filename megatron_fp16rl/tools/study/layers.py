"""Where a mismatch comes from: hidden states of both engines, layer by layer, on the same tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.recipe import Dtype
from megatron_fp16rl.tools.study.hidden import EMBEDDING, FINAL_NORM, LOGITS, points

States = dict[str, torch.Tensor]

# Relative error of a layer's output that rounding explains: half types round once what was summed in
# fp32, half the distance between 1 and the next number; in fp32 the sums themselves round, many times.
_ROUNDING = {"fp32": 2.0**-20, "fp16": 2.0**-11, "bf16": 2.0**-8}
# docs/results.md: rounding alone made it 1.9 times larger at most, a weight that was wrong by half 3.2
# times at least (in bf16; in fp16 26 times).
_JUMP = 3.0
_MEASURES = ("difference", "served_error", "learnt_error")


@torch.no_grad()
def learner_states(model: Model, ids: list[int]) -> States:
    """Hidden states [tokens, hidden] of one sequence at each of `points`, and its last logits.

    On one rank: the whole model must be there.
    """
    gpt, states = model.gpt_models[0], States()
    layers = {f"layer {i}": layer for i, layer in enumerate(gpt.decoder.layers)}
    modules = {EMBEDDING: gpt.embedding, **layers, FINAL_NORM: gpt.decoder.final_layernorm}

    def keep(point: str, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        states[point] = value[:, 0]  # [tokens, batch of one, hidden]

    hooks = [
        module.register_forward_hook(lambda *call, point=point: keep(point, call[-1]))
        for point, module in modules.items()
    ]
    tokens = torch.tensor([ids], device=model.world.device)
    positions = torch.arange(len(ids), device=model.world.device)[None]
    try:
        model.chunks[0].eval()
        logits = model.chunks[0](input_ids=tokens, position_ids=positions, attention_mask=None)
    finally:
        for hook in hooks:
            hook.remove()
    states[LOGITS] = logits[0, -1, : model.spec.shapes.vocabulary]
    return states


@dataclass
class Comparison:
    """Sums over all tokens compared, one for each point; see `rows`."""

    layers: int
    dtype: Dtype
    tokens: int = 0
    _sums: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, served: States, learnt: States, reference: States) -> None:
        """One sequence: from SGLang, from Megatron in the same dtype, and from Megatron in fp32."""
        self.tokens += len(learnt[EMBEDDING])
        for point in points(self.layers):
            s, m, r = (states[point].cpu().double() for states in (served, learnt, reference))
            size = r.norm(dim=-1)
            nonzero = size > 0  # the embedding of a padding token may be zero
            sums = self._sums.setdefault(point, dict.fromkeys(("count", *_MEASURES), 0.0))
            sums["count"] += int(nonzero.sum())
            for name, value in zip(_MEASURES, (s - m, s - r, m - r), strict=True):
                sums[name] += (value.norm(dim=-1)[nonzero] / size[nonzero]).sum().item()

    def rows(self) -> list[dict[str, Any]]:
        """In the order in which a model computes. Each is relative, a mean over tokens:

        difference     |SGLang - Megatron| / |reference|, Euclidean norms of a token's hidden state.
                       Token by token, because a few of them have states that dwarf all others
        served_error, learnt_error   |engine - reference| / |reference|
        added          difference less that of the point before
        grown          difference over that of the point before, which counts as one rounding at least
        """
        rows, before, least = [], 0.0, _ROUNDING[self.dtype]
        for order, (point, sums) in enumerate(self._sums.items()):
            means = {name: sums[name] / sums["count"] for name in _MEASURES}
            difference = means["difference"]
            change = {"added": difference - before, "grown": difference / max(before, least)}
            rows.append({"point": point, "order": order, **means, **change})
            before = difference
        return rows


def first_jump(rows: Iterable[dict[str, Any]]) -> str | None:
    """The first point that makes the difference 3 times larger, which rounding does not: suspect it."""
    return next((row["point"] for row in rows if row["grown"] > _JUMP), None)
