"""Updates under options of Megatron's data parallelism and optimizer: what they leave, and what was overlapped."""

from typing import Any

import torch

from megatron_fp16rl.learner.ddp import gather_parameters
from tests.workers.common import (
    answered,
    export_all,
    family_recipe,
    join_world,
    make_learner,
    my_share,
    shards_of,
)

SCALE = 1024.0
UPDATES, SKIPPED = 3, 1  # the second one's gradients overflow


def variants(
    layout: dict, family: str, variants: dict[str, dict], one_update: bool = False
) -> dict:
    """By name of a variant, settings of `learner`: what updates, one of them skipped, come to."""
    world, results = join_world(**layout), {}
    for name, settings in variants.items():
        learner = _learner(layout, family, world, settings)
        if one_update:
            learner.supervised_update(my_share(answered(), world))
            results[name] = {"shards": shards_of(learner)}
        else:
            results[name] = _updates(learner)
    return results


def _learner(layout: dict, family: str, world: Any, settings: dict) -> Any:
    # Not clipped: the last bit of the distributed optimizer's norm depends on where buckets are cut.
    optimizer = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1e9}
    optimizer |= settings.get("optimizer", {})
    recipe = family_recipe(
        *(family, layout),
        learner={"micro_batch_tokens": 24, **settings, "optimizer": optimizer},
        precision={"loss_scale": {"initial": SCALE}},
    )
    return make_learner(recipe, world)


def _updates(learner: Any) -> dict:
    model, mine = learner.model, my_share(answered(), learner.world)
    groups = [g for c in model.chunks for g in c.bucket_groups + c.expert_parallel_bucket_groups]
    in_flight, finalize = [], model.config.finalize_model_grads_func

    def watched(*arguments: Any, **options: Any) -> None:
        in_flight.append(sum(g.grad_reduce_handle is not None for g in groups))
        finalize(*arguments, **options)

    model.config.finalize_model_grads_func = watched
    log, norms, underflow, kept, stale = [], [], [], False, []

    def token_losses(logprobs: torch.Tensor, rows: Any) -> tuple[torch.Tensor, dict]:
        return -logprobs * rows.mask, {}

    for update in range(UPDATES):
        before = shards_of(learner)
        if update == SKIPPED:  # of the next forward pass, before this one's overflow
            learner.score(mine)
            before = shards_of(learner)
            learner.scaler.scale.fill_(2.0**60)
        outcome, loss, _ = learner.train_update(mine, token_losses, mine.mask.sum().float())
        log.append([outcome.stepped, loss])
        underflow.append(outcome.underflow_fraction)
        norms += [outcome.grad_norm] if outcome.stepped else []
        if update == SKIPPED:
            learner.scaler.scale.fill_(SCALE)
            kept = shards_of(learner) == before
            scores = learner.score(mine).pi_logprobs  # gathers
            kept = kept and shards_of(learner) == before
            log.append(scores.sum().item())
            continue
        left = shards_of(learner)
        if update == 0:
            gather_parameters(model.chunks)  # as a reader of the parameters does
        stale.append(left != shards_of(learner))
    learner.supervised_update(mine)
    exported = export_all(learner)
    first, second = learner.score(mine).pi_logprobs, learner.score(mine).pi_logprobs
    return {
        "log": log,
        "norms": norms,
        "underflow": underflow,
        "kept": kept,
        "stale": stale[0],
        "in_flight": in_flight,
        "micro_batches": len(learner.forward.micro_batches(mine)),
        "buckets": len(groups),
        "shards": shards_of(learner),
        "exported": exported.double().sum().item(),
        "scores": [first.sum().item(), second.sum().item()],
    }
