"""Batches on their way between ranks."""

from dataclasses import fields

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fp16rl.data.batch import Batch, compact
from megatron_fp16rl.learner import exchange
from tests import models
from tests.workers.common import join_world

LARGE = "recipes/moe/qwen3-235b-a22b-dapo-fp16-24n8g.yaml"


def _whole(count: int, layers: int, experts: int) -> Batch:
    """`count` sequences of very unequal length, no two of them alike in anything."""
    lengths = tuple(3 + (7 * i) % 23 for i in range(count))
    batch = Batch.from_token_ids(models.random_tokens(14, lengths))
    generator = torch.Generator().manual_seed(1)
    shape = (*batch.tokens.shape, layers, 2)
    chosen = torch.randint(-1, experts, shape, generator=generator)
    for row, length in enumerate(lengths):
        chosen[row, length:] = -1
    return batch.replace(
        mu_logprobs=torch.randn(batch.tokens.shape, generator=generator) * batch.mask,
        rewards=torch.arange(count) / 7,
        truncated=torch.arange(count) % 3 == 0,
        experts=compact(chosen, experts),
    )


def _same(one: Batch, other: Batch) -> bool:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
            return False
    return True


def from_leader(layout: dict, staged: int) -> dict:
    """What each rank has of its leader's batch. staged: bytes of records that go at once."""
    exchange._CHUNK_BYTES = staged
    world = join_world(**layout)
    of_stage = {0: [1, 2], 1: [0, 5]}[world.pipeline.rank]
    results = {}
    for experts in (255, 256):
        whole = _whole(6, 7, experts)
        mine = whole if world.is_leader else None
        got = exchange.from_leader(mine, world, of_stage)
        results[str(experts)] = _same(got, whole.replace(experts=whole.experts[:, :, of_stage]))
        plain = exchange.from_leader(mine, world, None)
        results[f"{experts} unread"] = _same(plain, whole.replace(experts=None))
        none = exchange.from_leader(
            whole.replace(experts=None) if world.is_leader else None, world, of_stage
        )
        results[f"{experts} none"] = _same(none, whole.replace(experts=None))
    # A stage may have no router, as the first ones of DeepSeek-V3 have none.
    layers = [] if world.pipeline.rank else [3]
    whole = _whole(6, 7, 255)
    got = exchange.from_leader(whole if world.is_leader else None, world, layers)
    results["a stage without routers"] = _same(
        got, whole.replace(experts=whole.experts[:, :, layers])
    )
    return results


def moved(staged: int) -> dict:
    """Sequences dealt to ranks of which nobody has them all. staged: as in `from_leader`."""
    world = join_world()
    ranks, share = world.size, 6
    whole = _whole(ranks * share, 3, 255)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(2)).tolist()
    shares = [order[rank * share :][:share] for rank in range(ranks)]
    first = world.rank * share
    mine = whole.rows(range(first, first + share))  # as long as its own longest
    lengths = exchange.all_lengths(mine.lengths, world.data)
    exchange._CHUNK_BYTES = staged
    all_to_all, sizes = torch.distributed.all_to_all_single, []

    def counted(
        output: torch.Tensor, given: torch.Tensor, *rest: object, **options: object
    ) -> object:
        sizes.append(max(output.numel(), given.numel()))
        return all_to_all(output, given, *rest, **options)

    torch.distributed.all_to_all_single = counted
    got = exchange.redistribute(mine, shares, max(lengths), world)
    return {
        "lengths": lengths == whole.lengths.tolist(),
        "same": _same(got, whole.rows(shares[world.rank], max(lengths))),
        "largest": max(sizes),
        "row": max(whole.experts[0].nbytes, whole.tokens[0].nbytes),
    }


class _BackFromNowhere(TorchDispatchMode):
    """Copies of meta tensors to the host have no values, but they are."""

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if function is torch.ops.aten._to_copy.default and args[0].is_meta and to is not None:
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=to)
        return function(*args, **kwargs)


def on_the_device() -> dict:
    """Bytes on a device, at most, of a batch as it goes to rank 0, is dealt out, and replayed.

    Layers, experts and layout are those of Qwen3-235B; sequences and tokens an eighth each. The device is
    the planner's, where every tensor is counted and none has values.
    """
    from transformers import AutoConfig

    from megatron_fp16rl import platform

    platform.plan_only()
    from megatron_fp16rl.data.micro_batches import MicroBatch
    from megatron_fp16rl.learner.model import Model
    from megatron_fp16rl.learner.router_replay import RouterReplay
    from megatron_fp16rl.models.spec import describe
    from megatron_fp16rl.recipe import load
    from megatron_fp16rl.tools.plan.live_bytes import LiveBytes
    from megatron_fp16rl.tools.plan.rank import rank_of

    layout = load(LARGE).learner
    size = {"num_hidden_layers": 94, "num_experts": 128, "num_experts_per_tok": 8}
    size |= {"num_key_value_heads": 4}
    config = AutoConfig.for_model(vocab_size=99, **{**models.QWEN3_MOE, **size})
    count, seq, layers, top_k = 512 // 8, 10_240 // 8, 94, 8
    exchange._CHUNK_BYTES //= 64
    torch.distributed.batch_isend_irecv = lambda operations: []  # not for meta tensors
    with rank_of(layout, 0) as world:
        model = Model(describe(config, layout), "fp16", world)
        replay = RouterReplay(model)
        share = count // world.data.size
        floats, whole = torch.zeros(share, seq), torch.zeros(share, dtype=torch.int64)
        batch = Batch(
            tokens=torch.zeros(share, seq, dtype=torch.int64),
            lengths=whole + seq,
            mask=floats.bool(),
            mu_logprobs=floats,
            rewards=whole.float(),
            groups=whole,
            truncated=whole.bool(),
            experts=torch.zeros(share, seq, layers, top_k, dtype=torch.uint8),
        )
        with _BackFromNowhere(), LiveBytes() as live:
            batch = exchange.from_leader(batch, world, replay.layers)
            batch = batch.scored(batch.mu_logprobs.clone())
            batch = batch.with_advantages(batch.mu_logprobs.clone())
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            dealt = exchange.redistribute(batch, order.view(-1, share).tolist(), seq, world)
            for row in range(share):
                part = MicroBatch([row], (1, seq)).select(dealt)
                replay.set(model.chunks[0], part.experts)
        return {
            "peak": live.peak,
            "before": 4 * count * seq * layers * top_k,
            "layers": len(replay.layers),
            "host": batch.experts.nbytes,
            "host_layers": batch.experts.shape[2],
        }
