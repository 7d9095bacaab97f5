"""The loop: sample with SGLang, score and learn with Megatron, send the weights back."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_fp16rl import mismatch, platform
from megatron_fp16rl.batch import statistics
from megatron_fp16rl.checkpoints import Damaged, available, prune, set_aside
from megatron_fp16rl.learner import Learner, checkpoint
from megatron_fp16rl.learner.checkpoint import Progress
from megatron_fp16rl.learner.world import initialize, shutdown
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.recording import Replay
from megatron_fp16rl.rollout.rollouts import Rollouts, ServersGone
from megatron_fp16rl.run import Run
from megatron_fp16rl.tasks import make
from megatron_fp16rl.warm_start import warm_start
from megatron_fp16rl.weights.build import model_folder
from megatron_fp16rl.worst import Worst


def train(
    recipe: Recipe,
    folder: Path,
    servers: Path,
    beat: Callable[[str], None] = lambda at: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """One learner rank, from start to end; the launcher starts as many as the recipe has.

    folder: the run directory; servers: the folder in which rollout servers are announced; beat: told
    what comes next, so that a hang shows. Returns whether all steps are done: False if it was asked
    to stop, and did after a step, with a checkpoint.
    """
    from transformers import AutoTokenizer

    # The watchdog is to be first: it says more than a collective that has waited too long.
    patience = max(1800, 2 * (recipe.trainer.step_timeout_s or 0))
    world = initialize(recipe.learner, recipe.trainer.seed, patience)
    run = Run(recipe, folder, world)
    run.say(f"learner: {world.size} rank(s), {platform.current().describe()}")
    like = model_folder(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(like)
    task = make(recipe.task, tokenizer, recipe.trainer.seed)
    run.say(f"task: {task.description}")
    learner = Learner(recipe, like, world)
    saved = folder / "checkpoints"
    resumed = bool(world.from_first(available(saved)))
    if resumed:
        if recipe.algorithm.kl is not None:
            learner.load(folder / "reference")
            learner.keep_reference()
        progress = _restore(learner, saved, run)
    else:
        progress = Progress(step=0, version=0)
        run.resume(0, 0)  # what an earlier attempt may have written
        if recipe.warm_start is not None:
            warm_start(recipe, learner, task, tokenizer, like, run, beat)
        if recipe.algorithm.kl is not None or _adapts_a_warm_start(recipe):
            learner.save(folder / "reference", like)
        if recipe.algorithm.kl is not None:
            learner.keep_reference()
    if recipe.rollout.replay is None:
        rollouts = Rollouts(recipe, task, world, servers, like, folder)
    else:
        rollouts = Replay(recipe, world)
    worst = Worst(folder, world, tokenizer, progress.step)
    held_out = task.held_out_prompts(recipe.trainer.eval_prompts)

    beat("the first weight sync and evaluation")
    publish(learner, rollouts, run, progress.version)
    after, samples = rollouts.evaluate(held_out)
    if not resumed:
        progress = replace(progress, accuracy_before=after)
        run.save_samples("before", samples)
    if after is not None:
        run.say(f"held-out accuracy: {after:.3f} ({len(held_out)} prompts)")

    def save(step: int) -> None:
        nonlocal progress
        if world.from_first(any(found.step == step for found in available(saved))):
            return
        progress = replace(progress, step=step, version=rollouts.version, tokens=run.tokens)
        with run.timed("checkpoint"):  # counted with the next step
            checkpoint.save(learner, saved, progress, like)
            if world.is_first:
                prune(saved, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every)

    gc.collect()
    gc.freeze()  # a full collection over all that was imported would stop a step for half a second
    for step in run.steps(progress.step):
        beat(f"step {step + 1}")
        learner.faults.step = step
        try:
            with run.timed("rollout"):
                batch = rollouts.collect(step)
        except ServersGone:
            save(step)  # nothing of this step has been learnt
            raise
        run.record(rollouts.counts)
        with run.timed("score"):
            batch = learner.score(batch)
        batch = learner.prepare(batch)
        run.record(mismatch.measure(batch, world.data.group))
        worst.keep(batch, step)
        if learner.replay:
            run.record({"mismatch/router_agreement": learner.replay.agreement()})
        with run.timed("update"):
            outcome = learner.update(batch, step)
        run.record(outcome.metrics)
        stop, newcomers = world.from_first((is_asked_to_stop(), rollouts.newcomers))
        is_last, gone = step + 1 == recipe.trainer.steps, None
        try:
            if outcome.stepped or newcomers:
                version = step + 1 if outcome.stepped else rollouts.version
                with run.timed("sync"):
                    publish(learner, rollouts, run, version)
            if (step + 1) % recipe.trainer.eval_every == 0 or is_last:
                with run.timed("eval"):
                    after, samples = rollouts.evaluate(held_out)
                    suites = rollouts.evaluate_suites()
                run.record({"eval/accuracy": after, **rollouts.counts, **suites})
        except ServersGone as error:
            gone = error  # what was learnt is kept
        run.record({"sync/version": rollouts.version, **statistics(batch, world.data.group)})
        run.finish(step)
        if gone or stop or is_last or (step + 1) % recipe.checkpoint.every == 0:
            save(step + 1)
        if gone:
            raise gone
        if stop and not is_last:
            run.say(f"stopped on request after {step + 1} of {recipe.trainer.steps} steps, saved")
            run.close()
            shutdown()
            return False

    beat("the end of the run")
    run.save_samples("after", samples)
    learner.save(folder / "export", like)
    if recipe.learner.lora is not None:
        base = str(folder / "reference") if _adapts_a_warm_start(recipe) else recipe.model.path
        learner.save_adapter(folder / "adapter", base or str(like))
    run.summarise(progress.accuracy_before, after)
    run.close()
    shutdown()
    return True


def _restore(learner: Learner, saved: Path, run: Run) -> Progress:
    """Goes on from the newest checkpoint that is whole; damaged ones are named and set aside."""
    while True:
        found = learner.world.from_first(available(saved))
        try:
            progress = checkpoint.load(learner, found[0])
        except Damaged as damage:
            if len(found) == 1:
                raise
            run.say(f"{damage.what}; set aside, going on from {found[1].path}")
            if learner.world.is_first:
                set_aside(found[0])
            continue
        run.resume(progress.step, progress.tokens)
        steps = learner.recipe.trainer.steps
        run.say(f"resumed from {found[0].path}: {progress.step} of {steps} steps done")
        return progress


def _adapts_a_warm_start(recipe: Recipe) -> bool:
    """Whether the adapters belong to weights that only this run has."""
    return recipe.learner.lora is not None and recipe.warm_start is not None


def publish(learner: Learner, rollouts: Rollouts | Replay, run: Run, version: int) -> None:
    """Sends the learner's weights to the servers, and checks now and then that they got there."""
    is_first = rollouts.version is None
    run.record({"sync/bytes": rollouts.publish(learner.export, version)})
    when = learner.recipe.sync.verify
    if when == "always" or (when == "first" and is_first):
        run.record({"sync/verified_logprob_abs_mean": rollouts.verify(learner.score)})
