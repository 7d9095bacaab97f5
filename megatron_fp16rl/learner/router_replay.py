"""Router replay: the learner uses the experts that the rollout engine chose.

A router picks the experts with the largest logits. Where two are nearly equal, rounding decides, and the
two engines send a token through different weights. Only the choice is replayed: the gates are
computed from the learner's own logits, so gradients flow as usual.
"""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megatron_fp16rl.data.batch import no_expert
from megatron_fp16rl.learner.model import Model

TopK = tuple[torch.Tensor, torch.Tensor]  # scores and experts, [tokens, top_k] each


class RouterReplay:
    """Sets what the routers of one rank choose.

    layers: of the whole model, those that have a router on this rank.

    Megatron-core 0.19.2 has a class of this name. It replays every token or none, and holds the
    routers of all models in one global list, so only its place in the router is used.
    """

    def __init__(self, model: Model) -> None:
        self.world = model.world
        self._choices = {
            chunk: [_Choice(m) for m in gpt.modules() if isinstance(m, TopKRouter)]
            for chunk, gpt in zip(model.chunks, model.gpt_models, strict=True)
        }
        self.layers = sorted(c.layer for choices in self._choices.values() for c in choices)

    def set(self, chunk: torch.nn.Module, experts: torch.Tensor | None) -> None:
        """Sets what the next forward pass of `chunk` replays.

        experts: [batch, seq, layers, top_k] on the host, as in Batch, of that pass's tokens and of
        `self.layers`; `no_expert` (or None, for all tokens) leaves the choice to the learner's router.
        """
        choices = self._choices[chunk]
        if experts is None:
            for choice in choices:
                choice.experts = None
            return
        # Only this chunk's layers, and this rank's tokens, go to the device.
        layers = [self.layers.index(choice.layer) for choice in choices]
        experts = experts.transpose(0, 1)
        if self.world.layout.sequence_parallel:
            experts = experts.chunk(self.world.tensor.size)[self.world.tensor.rank]
        by_layer = experts.permute(2, 0, 1, 3)[layers].contiguous()
        if self.world.device.type == "cuda":
            by_layer = by_layer.pin_memory()  # or the copy would not be asynchronous
        by_layer = by_layer.to(self.world.device, non_blocking=True)
        for choice, of_layer in zip(choices, by_layer, strict=True):
            choice.experts = of_layer.flatten(0, 1)

    def agreement(self) -> float | None:
        """Share of the replayed (token, layer, expert) that the learner would have chosen too.

        Over all score passes since the last call, and exactly over the world. Collective over it. None
        if nothing was replayed.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for choice in (c for choices in self._choices.values() for c in choices):
            sums += torch.stack([choice.agreed, choice.replayed])
            choice.reset()
        dist.all_reduce(sums)  # each token passes a layer's router on one rank only
        agreed, replayed = sums.tolist()
        return agreed / replayed if replayed else None


class _Choice:
    """The choice of one router; stands where Megatron's router looks for its RouterReplay."""

    def __init__(self, router: TopKRouter) -> None:
        self.router = router
        self.layer = router.layer_number - 1  # counted over all stages
        self.experts: torch.Tensor | None = None  # [tokens, top_k], see Batch.experts
        self._recomputed: deque[torch.Tensor | None] = deque()
        self.reset()
        router.router_replay = self

    def reset(self) -> None:
        self.agreed = self.replayed = torch.zeros((), device=self.router.weight.device).double()

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., TopK],
    ) -> TopK:
        """Called by Megatron's router in place of its own top-k."""
        best, own = default_compute_topk(scores, topk, num_groups, group_topk)
        replayed = self._for_this_pass()
        if replayed is None:
            return best, own
        known = replayed != no_expert(replayed.dtype)
        experts = torch.where(known, replayed, own)
        if not self.router.training:
            self.agreed = self.agreed + (replayed[:, :, None] == own[:, None, :]).sum()
            self.replayed = self.replayed + known.sum()
        return scores.gather(1, experts), experts

    def _for_this_pass(self) -> torch.Tensor | None:
        """The experts to replay now.

        A layer that is recomputed runs twice: first without gradients, then in the backward pass,
        when other micro-batches may have come in between; they take turns in the same order.
        """
        if self.router.training and not torch.is_grad_enabled():
            self._recomputed.append(self.experts)
            return self.experts
        return self._recomputed.popleft() if self._recomputed else self.experts
