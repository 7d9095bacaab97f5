"""Samples of several turns: what an environment wrote is read by the model, and never learnt."""

import torch

from megatron_fp16rl.data.batch import Batch, Prompt, Sample
from tests import models
from tests.workers.common import (
    fp32_recipe,
    gradients_of,
    join_world,
    make_learner,
    my_share,
    sharding,
)


def samples() -> list[Sample]:
    """Four of two prompts: three turns, two, one, and two whose environment said nothing."""
    sequences = models.random_tokens(6, (14, 11, 9, 12))
    masks = ["11100110101", "10000111", "111111", "111111111"]
    drawn = []
    for i, (ids, text) in enumerate(zip(sequences, masks, strict=True)):
        mask = [letter == "1" for letter in text]
        # Of the environment's tokens a server would have log-probs as well: none may count.
        logprobs = [-4.6 + 0.05 * (j % 5) if sampled else -9.0 for j, sampled in enumerate(mask)]
        reward = [1.0, 0.0, 0.25, 1.0][i]
        prompt = Prompt("", ids[:3], "")
        drawn.append(Sample(prompt, i // 2, ids[3:], logprobs, "", False, 0, reward, mask=mask))
    return drawn


def update(folder: str, layout: dict, algorithm: dict, file: str, learnt: bool = False) -> dict:
    """Loss and tokens of an update; its gradients go into `file`.

    learnt: a planted fault, the environment's tokens are learnt.
    """
    world = join_world(**layout)
    recipe = fp32_recipe(world.layout, **{**sharding(layout), "micro_batch_tokens": 32})
    settings = recipe.algorithm.model_copy(update={"old_policy": "rollout", **algorithm})
    learner = make_learner(recipe.model_copy(update={"algorithm": settings}), world, folder)
    batch = Batch.from_samples(samples())
    if learnt:
        place, ends = torch.arange(batch.tokens.shape[1]), batch.lengths[:, None]
        batch = batch.replace(mask=(place >= 3) & (place < ends))
    trained = learner.prepare(my_share(batch, world).scored(None))
    _, loss, stats = learner.train_update(
        trained, learner.algorithm.token_losses, learner.algorithm.normaliser(trained)
    )
    gradients = gradients_of(learner.model)
    if world.is_rank0:
        torch.save(gradients, file)
    return {"loss": loss, "tokens": stats["tokens"]}
