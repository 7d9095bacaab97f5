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


def from_leader(layout: dict, staged: list[int]) -> dict[str, bool]:
    """Whether each rank has what it should of its leader's batch. staged: bytes of records that go at once."""
    world = join_world(**layout)
    results = {}

    def check(name: str, batch: Batch, layers: list[int] | None) -> None:
        """layers: whose records of experts the rank wants."""
        kept = layers is not None and batch.experts is not None
        expected = batch.replace(experts=batch.experts[:, :, layers] if kept else None)
        got = exchange.from_leader(batch if world.is_leader else None, world, layers)
        results[name] = _same(got, expected)

    of_stage = [[1, 2], [0, 5]][world.pipeline.rank]
    for size in staged:
        exchange._CHUNK_BYTES = size
        for experts in (255, 256):
            batch = _whole(6, 7, experts)
            check(f"{size} {experts}", batch, of_stage)
            check(f"{size} {experts} unread", batch, None)
            check(f"{size} {experts} none", batch.replace(experts=None), of_stage)
        # A stage may have no router, as the first ones of DeepSeek-V3 have none.
        no_router = [] if world.pipeline.rank else [3]
        check(f"{size} a stage without routers", _whole(6, 7, 255), no_router)
    return results


def moved(staged: list[int]) -> list[dict]:
    """Sequences dealt to ranks of which nobody has them all. staged: as in `from_leader`."""
    world = join_world()
    ranks, share = world.size, 6
    whole = _whole(ranks * share, 3, 255)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(2)).tolist()
    shares = [order[rank * share :][:share] for rank in range(ranks)]
    first = world.rank * share
    mine = whole.rows(range(first, first + share))  # as long as its own longest
    lengths = exchange.all_lengths(mine.lengths, world.data)
    all_to_all, sizes, results = torch.distributed.all_to_all_single, [], []

    def counted(
        output: torch.Tensor, given: torch.Tensor, *rest: object, **options: object
    ) -> object:
        sizes.append(max(output.numel(), given.numel()))
        return all_to_all(output, given, *rest, **options)

    torch.distributed.all_to_all_single = counted
    for size in staged:
        exchange._CHUNK_BYTES = size
        sizes.clear()
        got = exchange.redistribute(mine, shares, max(lengths), world)
        results.append(
            {
                "staged": size,
                "lengths": lengths == whole.lengths.tolist(),
                "same": _same(got, whole.rows(shares[world.rank], max(lengths))),
                "largest": max(sizes),
                "row": max(whole.experts[0].nbytes, whole.tokens[0].nbytes),
            }
        )
    return results
