"""Packed sequences and context parallelism: what is where, and updates that need whole sequences."""

import torch

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.data.micro_batches import in_packs, in_rows
from megatron_fp16rl.recipe.learner import Padding
from tests import models
from tests.workers.common import (
    family_recipe,
    fp32_recipe,
    join_world,
    make_learner,
    my_share,
    sharding,
)

LENGTHS = [7, 3, 16, 1]


def arrangements(packed: bool) -> dict[str, dict]:
    """Of a micro-batch over 1, 2 and 4 context-parallel ranks: whether all ranks' views of it agree."""
    join_world()
    from megatron_fp16rl.learner.arrangement import arrange
    from megatron_fp16rl.parallel import Axis

    results = {}
    for ranks in (1, 2, 4):
        padding = Padding(2 * ranks, 4 * ranks)
        make = in_packs if packed else in_rows
        (micro_batch,) = make([[0, 1, 2, 3]], LENGTHS, padding, False)
        views = [arrange(micro_batch, Axis(ranks, rank, None)) for rank in range(ranks)]
        tokens = torch.arange(1, 1 + 4 * 16).view(4, 16)
        known = torch.arange(16) < torch.tensor(LENGTHS)[:, None]
        taken = [view.take(tokens, 0).flatten() for view in views]
        inverse = []
        for view, own in zip(views, taken, strict=True):
            here = view.place >= 0
            inverse.append(torch.equal(own[view.place[here]], tokens[here]))
        real = torch.cat(taken)
        results[str(ranks)] = {
            "inverse": all(inverse),
            "each_once": sorted(real[real > 0].tolist()) == sorted(tokens[known].tolist()),
            "first": (views[0].source[0, :4]).tolist(),
        }
    return results


def off_policy(folder: str, layout: dict, without: str | None = None) -> dict:
    """The loss and gradient norm of one GSPO update whose old log-probs are fixed.

    GSPO's ratios are of whole sequences: a rank that saw a part of one would compute others. without:
    "parting" packs sequences as if they were one; "sharing" leaves each context-parallel rank its own log-probs.
    """
    world = join_world(**layout)
    from megatron_fp16rl.learner.forward import dist as forward_dist
    from megatron_fp16rl.platform.local_attention import FusedAttention

    settings = {**sharding(layout), "micro_batch_tokens": 48}
    recipe = fp32_recipe(world.layout, **settings)
    algorithm = recipe.algorithm.model_copy(
        update={"loss": "gspo", "clip_low": 0.9, "clip_high": 0.9, "advantage": "reinforce"}
    )
    learner = make_learner(recipe.model_copy(update={"algorithm": algorithm}), world, folder)
    if without == "parting":
        attend = FusedAttention._attend
        FusedAttention.forward = lambda self, q, k, v, *_, **__: attend(
            self, q[:, None], k[:, None], v[:, None]
        )
    if without == "sharing":
        forward_dist.all_reduce = lambda *_, **__: None
    batch = Batch.from_token_ids(models.random_tokens())
    generator = torch.Generator().manual_seed(5)
    old = -4.6 + 0.3 * torch.randn(batch.tokens.shape, generator=generator)
    batch = batch.replace(
        mu_logprobs=old * batch.mask, rewards=torch.tensor([1.0, -1.0, 0.5, -0.3])
    )
    batch = my_share(batch, world)
    scored = batch.scored(batch.mu_logprobs)
    trained = scored.with_advantages(scored.rewards[:, None] * scored.mask)
    outcome, loss, stats = learner.train_update(
        trained, learner.algorithm.token_losses, learner.algorithm.normaliser(trained)
    )
    padding = 1 - stats["sequence_tokens"] / stats["run_tokens"]
    return {"loss": loss, "norm": outcome.grad_norm, "padding": padding}


def asked_for(folder: str, layout: dict) -> dict:
    """Scores of the last three tokens of long prompts, and of how many tokens there were logits."""
    world = join_world(**layout)
    recipe = fp32_recipe(world.layout, micro_batch_tokens=48, **sharding(layout))
    learner = make_learner(recipe, world, folder)
    whole = Batch.from_token_ids(models.random_tokens())
    place = torch.arange(whole.tokens.shape[1])
    last = (place >= whole.lengths[:, None] - 3) & whole.mask
    rows = []
    for gpt in learner.model.gpt_models:
        gpt.output_layer.register_forward_hook(lambda *args: rows.append(args[2][0].shape[0]))
    few, asked = learner.score(whole.replace(mask=last)).pi_logprobs, sum(rows)
    rows.clear()
    expected = learner.score(whole).pi_logprobs * last
    largest = (few - expected).abs().max().item()
    return {"apart": largest, "asked": asked, "whole": sum(rows), "last": int(last.sum())}


def fused_rope() -> list[str]:
    """What a learner of gpt-oss says to apply_rope_fusion, false and true; nothing where it takes it."""
    from megatron_fp16rl.recipe import RecipeError

    world, said = join_world(), []
    for fuse in (False, True):
        options = {"megatron": {"apply_rope_fusion": fuse}}
        try:
            make_learner(family_recipe("gpt-oss", {}, learner=options), world)
            said.append("")
        except RecipeError as error:
            said.append(str(error))
    return said
