"""Logits of the tokens that are asked for, and of no others: of a batch with long prompts, most are not."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


class OutputRows:
    """Has a model's output layer run on chosen rows of its hidden states."""

    def __init__(self, gpt: GPTModel) -> None:
        layer = gpt.output_layer
        self._chosen: tuple[torch.Tensor, int] | None = None
        self._group = layer.tp_group if layer.sequence_parallel else None
        if self._group is not None:
            # The rows are chosen of whole sequences, so these are gathered before the layer, not in it; the
            # gather's backward pass sums the gradients that the ranks' columns give, and cuts them again.
            layer.sequence_parallel, layer.disable_grad_reduce = False, True
        layer.register_forward_pre_hook(self._choose)

    def set(self, place: torch.Tensor, tokens: int) -> None:
        """Of which tokens the next pass gives logits; a pass without gives them all.

        place: [n], in the flattened [rows, tokens] of this pass. The logits are [1, n, vocab / ranks].
        """
        self._chosen = place, tokens

    def _choose(self, _: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs  # [tokens, rows, hidden]
        if self._group is not None:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._group)
        if self._chosen is not None:
            (place, tokens), self._chosen = self._chosen, None
            index = place % tokens * hidden.shape[1] + place // tokens
            hidden = hidden.flatten(0, 1).index_select(0, index)[:, None]
        return (hidden, *rest)
