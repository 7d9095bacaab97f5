"""Checkpoints saved and gone on from."""

from pathlib import Path

import torch

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


def saved_in_background(folder: str, layout: dict, family: str) -> dict:
    """Digests of a checkpoint, and of one that other processes write while the learner goes on.

    Then two that do not come to their end, and what the ranks say of it: one's writer is killed, one's
    disk is full. And one more, and what is there at last.
    """
    import os
    import signal

    from megatron_fp16rl.learner import background, checkpoint
    from megatron_fp16rl.learner.checkpoint_files import available
    from megatron_fp16rl.models.build import model_folder

    world = join_world(**layout)
    recipe = family_recipe(family, layout, None, 0, checkpoint={"background": True, "keep_last": 1})
    like, root = model_folder(recipe.model), Path(folder)
    learner, mine = make_learner(recipe, world, like), my_share(answered(), world)
    saver, said = background.Saver(world, recipe.checkpoint), []
    learner.supervised_update(mine)
    saved = checkpoint.save(learner, root / "at_once", checkpoint.Progress(1, 1), like).files()

    def save(step: int, killed: bool = False, **options: object) -> None:
        """Two thirds of a save before an update, one third after it."""
        spawn = background.spawn
        background.spawn = lambda *names, **more: spawn(*names, **more, **options)
        saver.begin(learner, root / "later", checkpoint.Progress(step, step), like)
        background.spawn = spawn
        if killed and world.rank == 1:
            os.kill(saver._pending.writer.process.pid, signal.SIGKILL)
        learner.supervised_update(mine)
        try:
            saver.end(wait=False)
            saver.end(wait=True)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    save(1)
    (later,) = available(root / "later")
    written = later.files()
    same_generators = _generators(root / "at_once" / "step_1", world.rank) == _generators(
        later.path, world.rank
    )
    save(2, killed=True)
    save(3, preexec_fn=_limit_files)
    between = [c.step for c in available(root / "later")]
    save(4)
    world.gather(None)  # rank 0 has removed old ones
    checkpoints = available(root / "later")
    return {
        "at_once": saved,
        "later": written,
        "same_generators": same_generators,
        "said": said,
        "between": between,
        "steps": [c.step for c in checkpoints],
        "faults": [c.faults(c.files()) for c in checkpoints],
        "leftovers": [f.name for f in (root / "later").glob(".step_*")],
    }


def _limit_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def _generators(checkpoint: Path, rank: int) -> list:
    """Of random numbers, in the order of names: a safetensors file's differs each time."""
    from safetensors import safe_open

    with safe_open(checkpoint / "rng" / f"rank_{rank}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}
        return [tensors, sorted(file.metadata().items())]


def to_hugging_face(checkpoint: str, folder: str) -> None:
    """Converts a checkpoint."""
    from megatron_fp16rl.tools import convert

    convert.to_hugging_face(Path(checkpoint), Path(folder))


def run(folder: str) -> str:
    """A rank of the run in a folder, as launchers start it. Returns the error that ended it, if one did."""
    from launch import rank
    from megatron_fp16rl.utils.errors import ExplainedError

    try:
        rank._run(Path(folder))
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
