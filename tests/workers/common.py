"""What several workers need."""

import os
from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.parallel import initialize
from megatron_fp16rl.recipe import Layout
from tests import models


def join_world(**layout):
    """Joins the ranks of this test in a layout."""
    only = {k: v for k, v in layout.items() if k not in sharding(layout)}
    return initialize(Layout(**{"ranks": int(os.environ["WORLD_SIZE"]), **only}), seed=0)


def sharding(layout: dict) -> dict:
    """What of a test's layout is no Layout's: how replicas share their work."""
    return {k: v for k, v in layout.items() if k in ("distributed_optimizer", "ddp", "packing")}


def fp32_recipe(layout: Layout, **learner):
    settings = {
        **layout.model_dump(),
        "global_batch_size": 4,
        "optimizer": {"lr": 1e-3, "clip_grad": 1e9},
    }
    return models.recipe(
        learner={**settings, **learner}, precision={"dtype": "fp32"}, rollout=_rollout()
    )


def fp16_recipe(layout: Layout, **megatron):
    return models.recipe(
        learner={**layout.model_dump(), "global_batch_size": 4, "megatron": megatron},
        rollout=_rollout(),
    )


def _rollout() -> dict:
    return {"prompts": 4, "samples": 2, "max_new_tokens": 5}


def family_recipe(
    family: str, layout: dict, lora: dict | None = None, seed: int = 0, learner=None, **sections
):
    """Sixteen sequences an update, of a tiny random model of a family. learner: more of that section."""
    from megatron_fp16rl.recipe import BuildModel, Model

    config = {**models.FAMILIES, **models.DEEP, **models.MOE_FAMILIES}[family]
    ranks = int(os.environ["WORLD_SIZE"])
    return models.recipe(
        model=Model(build=BuildModel(config=config, alphabet=models.ALPHABET, seed=seed)),
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
        learner={
            **layout,
            "ranks": ranks,
            "global_batch_size": 16,
            "lora": lora,
            **(learner or {}),
        },
        **sections,
    )


def with_replay(recipe):
    rollout = recipe.rollout.model_copy(update={"router_replay": True})
    return recipe.model_copy(update={"rollout": rollout})


def make_learner(recipe, world, folder=None):
    """folder: of the model, if not the one that the recipe builds."""
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.models.build import model_folder

    return Learner.from_recipe(recipe, Path(folder or model_folder(recipe.model)), world)


def answered() -> Batch:
    """Sixteen short sequences over the alphabet of the tiny recipe."""
    return Batch.from_token_ids(models.random_tokens(14, (10,) * 16))


def my_share(batch: Batch, world: object) -> Batch:
    share = len(batch) // world.data.size
    return batch.rows(torch.arange(share) + share * world.data.rank)


def shards_of(learner: object) -> dict[str, str]:
    """A digest of each parameter shard of this rank; equal names must mean equal digests."""
    import hashlib
    from itertools import chain

    model, digests = learner.model, {}
    for shard in chain(model.weights, model.adapters):
        bits = shard.parameter.detach().float().numpy().tobytes()
        digests[f"{model.canonical_name(shard.name)} {model.tensor_axis(shard).rank}"] = (
            hashlib.sha256(bits).hexdigest()
        )
    return digests


def gradients_of(model) -> dict:
    """Gradients of the trained parameters, full, in Hugging Face's names, on rank 0."""
    from megatron_fp16rl.learner.export import gather

    return dict(gather(model, model.trained, lambda p: p.main_grad, torch.float32))


def trained_of(model) -> dict:
    """Copies of the trained parameters, full, in Hugging Face's names, on rank 0."""
    from megatron_fp16rl.learner.export import gather

    return dict(gather(model, model.trained, torch.Tensor.clone, torch.float32))


def export_all(learner: object) -> object:
    """All exported weights in one vector, on every rank, in the order of their names."""
    exported = {name: tensor.float().flatten() for name, tensor in learner.export()}
    exported = [exported[name] for name in sorted(exported)]
    return learner.world.broadcast_from_rank0(torch.cat(exported) if exported else None)


def noisy(folder: object) -> object:
    """The weights of a folder, disturbed, in fp16."""
    generator = torch.Generator().manual_seed(7)
    for name in folder.names():
        tensor = folder.read(name)
        yield name, (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).half()
