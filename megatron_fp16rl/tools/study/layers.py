"""Where a mismatch comes from: hidden states of both engines, layer by layer, on the same tokens."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.recipe import Dtype
from megatron_fp16rl.tools.study.hidden import EMBEDDING, FINAL_NORM, LOGITS

States = dict[str, torch.Tensor]  # by point, in the order of the computation

# Relative error of a layer's output that rounding explains: half types round once what was summed in
# fp32, half the distance between 1 and the next number; in fp32 the sums themselves round, many times.
_ROUNDING = {"fp32": 2.0**-20, "fp16": 2.0**-11, "bf16": 2.0**-8}
# docs/results.md: rounding alone made it 1.9 times larger at most, a weight that was wrong by half 3.2
# times at least (in bf16; in fp16 26 times).
_JUMP = 3.0


@torch.no_grad()
def learner_states(model: Model, ids: list[int]) -> States:
    """Hidden states [tokens, hidden] of one sequence at each of `hidden.points`, and its last logits.

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


def compare(sequences: Iterable[tuple[States, States, States]], dtype: Dtype) -> dict[str, Any]:
    """Compares the states of sequences from SGLang, from Megatron, and from Megatron in fp32.

    first_jump  the first point that makes the difference 3 times larger, which rounding does not: suspect
                it. None if there is none
    points      a row for each, in the order in which a model computes. Each is relative, a mean over
                tokens:
        difference     |SGLang - Megatron| / |reference|, Euclidean norms of a token's hidden state.
                       Token by token, because a few of them have states that dwarf all others
        served_error, learnt_error   |engine - reference| / |reference|
        grown          difference over that of the point before, which counts as one rounding at least
    """
    # By point and sequence: difference, served and learnt error of each token, [3, tokens].
    errors: dict[str, list[torch.Tensor]] = {}
    for served, learnt, reference in sequences:
        for point, state in reference.items():
            s, m, r = (
                torch.atleast_2d(value.cpu().double())  # of the logits there is one token
                for value in (served[point], learnt[point], state)
            )
            size = r.norm(dim=-1)
            absolute = torch.stack([s - m, s - r, m - r]).norm(dim=-1)
            # The embedding of a padding token may be zero.
            nonzero = size > 0
            errors.setdefault(point, []).append(absolute[:, nonzero] / size[nonzero])
    points: list[dict[str, Any]] = []
    before = 0.0
    for point, parts in errors.items():
        difference, served_error, learnt_error = torch.cat(parts, 1).mean(1).tolist()
        points.append(
            {
                "point": point,
                "difference": difference,
                "served_error": served_error,
                "learnt_error": learnt_error,
                "grown": difference / max(before, _ROUNDING[dtype]),
            }
        )
        before = difference
    jump = next((row["point"] for row in points if row["grown"] > _JUMP), None)
    tokens = sum(part.shape[1] for part in errors[FINAL_NORM])
    return {"tokens": tokens, "first_jump": jump, "points": points}
