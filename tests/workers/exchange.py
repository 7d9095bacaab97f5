"""Batches on their way between ranks."""

from dataclasses import fields

import torch

from megatron_fp16rl.data.batch import Batch, compact
from megatron_fp16rl.learner import exchange
from tests import models
from tests.workers.common import join_world


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
