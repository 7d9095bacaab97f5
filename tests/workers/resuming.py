"""Checkpoints saved and gone on from."""

from pathlib import Path

from tests import models
from tests.workers.common import (
    answered,
    export_all,
    family_recipe,
    join_world,
    make_learner,
    my_share,
    shards_of,
)


def resume(
    folder: str,
    layout: dict,
    family: str,
    before: int,
    after: int,
    lora: dict | None = None,
    seed: int = 0,
) -> dict:
    """Updates, one of them skipped, a checkpoint, more; begun at the checkpoint if there is one."""
    import torch

    from megatron_fp16rl.learner import checkpoint
    from megatron_fp16rl.learner.checkpoint_files import CheckpointError, available
    from megatron_fp16rl.models.build import model_folder

    world = join_world(**layout)
    recipe = family_recipe(
        *(family, layout, lora, seed),
        learner={
            "optimizer": {"lr": 1e-3, "warmup_updates": 4, "decay": "linear"},
            # A buffer that moves, where there is one.
            "megatron": {"moe_router_bias_update_rate": 1e-4},
        },
        trainer={"steps": 10},
        precision={"loss_scale": {"initial": 1024, "window": 3}},
    )
    like = model_folder(recipe.model)
    learner = make_learner(recipe, world, like)
    root, mine, log = Path(folder), my_share(answered(), world), []

    def updates(count: int) -> None:
        for _ in range(count):
            outcome, loss = learner.supervised_update(mine)
            log.append([loss, outcome.stepped, outcome.grad_norm, outcome.lr])

    found, progress = available(root), None
    if found:
        try:
            progress = checkpoint.load(learner, found[0]).__dict__
        except CheckpointError as error:
            return {"refused": str(error)}
    else:
        updates(1)
        main_gradients = learner.optimizer._main_gradients
        learner.optimizer._main_gradients = lambda: [g.fill_(torch.inf) for g in main_gradients()]
        updates(1)
        learner.optimizer._main_gradients = main_gradients
        updates(before - 2)
        log.clear()
        checkpoint.save(learner, root, checkpoint.Progress(before, before, 7, 0.25), like)
    at_checkpoint, state = export_all(learner).tolist(), learner.scaler.state_dict()
    updates(after)
    return {
        "progress": progress,
        "at_checkpoint": [at_checkpoint, state],
        "log": log,
        "shards": shards_of(learner),
        "weights": export_all(learner).tolist(),
        "scaler": learner.scaler.state_dict(),
    }


def saved_before_any_update(folder: str) -> list:
    """Weights after an update of a learner that has just saved a checkpoint, and of one that has not."""
    from megatron_fp16rl.learner import checkpoint
    from megatron_fp16rl.models.build import model_folder

    world = join_world()
    recipe = family_recipe("qwen3-tied", {}, None, 0)
    like, weights = model_folder(recipe.model), []
    for saves in (True, False):
        learner = make_learner(recipe, world, like)
        if saves:
            checkpoint.save(learner, Path(folder), checkpoint.Progress(0, 0), like)
        outcome, _ = learner.supervised_update(answered())
        assert outcome.stepped
        weights.append(export_all(learner).tolist())
    return weights


def to_hugging_face(checkpoint: str, folder: str) -> None:
    """Converts a checkpoint."""
    from megatron_fp16rl.tools import convert

    convert.to_hugging_face(Path(checkpoint), Path(folder))


def replayed_run(folder: str, recipe: str, settings: list[str]) -> str:
    """A run of a shipped recipe from recorded samples; it goes on from what is in its folder.

    Returns the error that ended it, if one did.
    """
    from megatron_fp16rl.recipe import load
    from megatron_fp16rl.train import train
    from megatron_fp16rl.utils.errors import ExplainedError

    try:
        train(load(Path(recipe), settings), Path(folder), Path(folder))
    except ExplainedError as error:
        return str(error)
    return ""


def gated_run(folder: str) -> str:
    """A run from the samples in its folder that a gate stops; returns what it ended with."""
    from megatron_fp16rl.metrics.gates import GateStop
    from megatron_fp16rl.train import train

    recipe = models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5, "replay": f"{folder}/rollouts"},
        learner={"ranks": 2, "global_batch_size": 8},
        checkpoint={"every": 100},
        gates=[{"metric": "reward/mean", "above": 0.1, "window": 2, "action": "stop"}],
    )
    try:
        train(recipe, Path(folder), Path(folder))
    except GateStop as stop:
        return str(stop)
    return "nothing"
