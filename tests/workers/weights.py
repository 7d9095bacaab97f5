"""Weights on their way in and out of a learner: what is refused, read, exported, and held meanwhile."""

from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch
from tests import models
from tests.workers.common import _rollout, fp16_recipe, join_world, make_learner


def load_errors(folders: list[str], layout: dict | None = None) -> list[str]:
    """What a learner in fp16 says of folders that it must refuse."""

    world = join_world(**(layout or {}))
    said = []
    for folder in folders:
        try:
            make_learner(fp16_recipe(world.layout), world, folder)
            said.append("loaded without a word")
        except (KeyError, ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def loaded(folder: str, layout: dict) -> int:
    """Bytes that this rank reads of a folder."""
    from megatron_fp16rl.learner.loading import load
    from megatron_fp16rl.learner.model import Model
    from megatron_fp16rl.models.config import load_config
    from megatron_fp16rl.models.folder import HFFolder
    from megatron_fp16rl.models.spec import describe

    world, source = join_world(**layout), HFFolder(folder)
    model = Model(describe(load_config(Path(folder)), world.layout), "fp16", world)
    load(model, source)
    return source.bytes_read


def expert_bias(folder: str, layout: dict, rates: list[float]) -> list[dict]:
    """What fp16 learners export before and after an update that moves the expert bias by a rate."""
    from megatron_fp16rl.learner.changes import Changes

    world = join_world(**layout)
    results = []
    for rate in rates:
        recipe = fp16_recipe(world.layout, moe_router_bias_update_rate=rate)
        learner = make_learner(recipe, world, folder)
        before, changes = (
            {n: tensor.clone() for n, tensor in learner.export()},
            Changes(learner.exported),
        )
        assert changes.count() is None
        outcome, _ = learner.supervised_update(Batch.from_token_ids(models.random_tokens()))
        learner.exported.check()
        changed, unchanged = changes.count(), changes.count()
        file = Path(folder) / f"exported-{rate}-{world.rank}.pt"
        torch.save((before, dict(learner.export())), file)
        counted = {"changed": changed, "unchanged": unchanged}
        results.append({"stepped": outcome.stepped, "file": str(file), **counted})
    return results


def export_memory(layout: dict, family: str, bucket: int) -> dict:
    """The most bytes that were alive at once while weights were put into buckets and dropped.

    Counted tensor by tensor, beside what was there before.
    """

    from megatron_fp16rl.recipe import BuildModel, Model
    from megatron_fp16rl.rollout.weight_sync.broadcast import buckets
    from megatron_fp16rl.tools.plan.live_bytes import LiveBytes

    world = join_world(**layout)
    config = {**models.FAMILIES, **models.MOE_FAMILIES}[family]
    config = {**config, "num_hidden_layers": 8}
    recipe = models.recipe(
        model=Model(build=BuildModel(config=config, alphabet=models.ALPHABET)),
        learner={**world.layout.model_dump(), "global_batch_size": 4},
        rollout=_rollout(),
    )
    learner = make_learner(recipe, world)
    names = [name for name, _ in learner.export()]
    parameters = [
        shard.parameter.nbytes * learner.model.tensor_axis(shard).size
        for shard in learner.model.weights
    ]
    again, sizes = [], [0]
    with LiveBytes("cpu") as live:
        tensors = learner.exported.whole(bucket)
        for bucket_of, _ in buckets(tensors, bucket, torch.float16, ()):
            if not bucket_of:
                break  # on ranks that only take part in the gathering
            flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket_of])
            again += [name for name, _ in bucket_of]
            sizes += [tensor.nbytes for _, tensor in bucket_of]
            del flat, bucket_of
    return {
        "same_order": names == again,
        "peak": live.peak,
        "left": live.now,
        "largest": max(parameters),
        "total": sum(sizes),
    }
