"""The loop: sample with SGLang, score and learn with Megatron, send the weights back."""

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.checks import check_held_out
from megatron_fp16rl.data.batch import Batch, Sample, statistics
from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.learner import Learner, Outcome, checkpoint
from megatron_fp16rl.learner.checkpoint import Progress
from megatron_fp16rl.learner.checkpoints import Damaged, available, prune, set_aside
from megatron_fp16rl.metrics import mismatch
from megatron_fp16rl.metrics.run import Run
from megatron_fp16rl.metrics.worst import Worst
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.parallel import World, initialize
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.recording import Replay
from megatron_fp16rl.rollout.rollouts import Rollouts, ServersGone
from megatron_fp16rl.utils.watchdog import Watchdog
from megatron_fp16rl.warm_start import warm_start


def train(
    recipe: Recipe,
    folder: Path,
    servers: Path,
    watchdog: Watchdog | None = None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """One learner rank, from start to end; the launcher starts as many as the recipe has.

    folder: the run directory; servers: the folder in which rollout servers are announced; watchdog:
    told what comes next, so that a hang shows. Returns whether all steps are done: False if it was asked
    to stop, and did after a step, with a checkpoint.
    """
    # The watchdog is to be first: it says more than a collective that has waited too long.
    patience = max(1800, 2 * (recipe.trainer.step_timeout_s or 0))
    patience += max(recipe.rollout.start_timeout_s, recipe.rollout.wait_for_servers_s)
    os.environ.update(nccl.agreed(recipe.rollout))
    world = initialize(recipe.learner, recipe.trainer.seed, patience)
    loop = _Loop(recipe, folder, servers, world, watchdog or Watchdog.idle())
    loop.begin()
    gc.collect()
    gc.freeze()  # a full collection over all that was imported would stop a step for half a second
    done = loop.steps(is_asked_to_stop)
    if done:
        loop.end()
    loop.run.close()
    # Whoever returns may leave: all have written what they have to. No group is taken apart before:
    # with NCCL that waits for all others on a node, the servers among them, which go on.
    dist.barrier()
    return done


class _Loop:
    """A run, as one rank goes through it. Every method is collective over the world."""

    def __init__(
        self, recipe: Recipe, folder: Path, servers: Path, world: World, watchdog: Watchdog
    ) -> None:
        """The learner with the weights that it begins with, or goes on from; servers to be met."""
        self.recipe, self.folder, self.world, self.beat = recipe, folder, world, watchdog.beat
        self.run = Run(recipe, folder, world)
        self.run.say(f"learner: {world.size} rank(s), {platform.current().describe()}")
        self.like = model_folder(recipe.model)
        self.tokenizer = load_tokenizer(self.like)
        self.task = make(recipe.task, self.tokenizer, recipe.trainer.seed)
        self.run.say(f"task: {self.task.description}")
        check_held_out(recipe, len(self.task.held_out_prompts(1)))
        self.learner = Learner(recipe, self.like, world)
        if kernel := self.learner.attention.kernel(recipe.rollout.max_new_tokens):
            self.run.say(f"attention: {kernel}")
        self.saved = folder / "checkpoints"
        self.resumed = bool(world.from_first(available(self.saved)))
        self.progress = self._restore() if self.resumed else self._start()
        if recipe.rollout.replay is None:
            self.rollouts = Rollouts(
                recipe, self.task, world, servers, self.like, folder, watchdog.waiting
            )
        else:
            self.rollouts = Replay(recipe, world)
        self.worst = Worst(folder, world, self.tokenizer, self.progress.step)
        self.held_out = self.task.held_out_prompts(recipe.trainer.eval_prompts)
        self.accuracy: float | None = None  # when the held-out prompts were asked last
        self.samples: list[Sample] = []  # of these

    def _start(self) -> Progress:
        self.run.resume(0, 0)  # what an earlier attempt may have written
        recipe, learner = self.recipe, self.learner
        if recipe.warm_start is not None:
            warm_start(recipe, learner, self.task, self.tokenizer, self.like, self.run, self.beat)
        if recipe.algorithm.kl is not None or self._adapts_a_warm_start:
            learner.save(self.folder / "reference", self.like)
        if recipe.algorithm.kl is not None:
            learner.keep_reference()
        return Progress(step=0, version=0)

    def _restore(self) -> Progress:
        """Goes on from the newest checkpoint that is whole; damaged ones are named and set aside."""
        if self.recipe.algorithm.kl is not None:
            self.learner.load(self.folder / "reference")
            self.learner.keep_reference()
        while True:
            found = self.world.from_first(available(self.saved))
            try:
                progress = checkpoint.load(self.learner, found[0])
            except Damaged as damage:
                if len(found) == 1:
                    raise
                self.run.say(f"{damage.what}; set aside, going on from {found[1].path}")
                if self.world.is_first:
                    set_aside(found[0])
                continue
            self.run.resume(progress.step, progress.tokens)
            steps = self.recipe.trainer.steps
            self.run.say(f"resumed from {found[0].path}: {progress.step} of {steps} steps done")
            return progress

    @property
    def _adapts_a_warm_start(self) -> bool:
        """Whether the adapters belong to weights that only this run has."""
        return self.recipe.learner.lora is not None and self.recipe.warm_start is not None

    def begin(self) -> None:
        """Waits for the servers, gives them the weights, and asks the held-out prompts."""
        self.beat("the first weight sync and evaluation")
        self._publish(self.progress.version)
        self.accuracy, self.samples = self.rollouts.evaluate(self.held_out)
        if not self.resumed:
            self.progress = replace(self.progress, accuracy_before=self.accuracy)
            self.run.save_samples("before", self.samples)
        if self.accuracy is not None:
            count = len(self.held_out)
            self.run.say(f"held-out accuracy: {self.accuracy:.3f} ({count} prompts)")

    def steps(self, is_asked_to_stop: Callable[[], bool]) -> bool:
        """All that are left. Returns False if it was asked to stop before the last, and did."""
        total, every = self.recipe.trainer.steps, self.recipe.checkpoint.every
        for step in self.run.steps(self.progress.step):
            self.beat(f"step {step + 1}")
            batch, outcome = self._learn(step)
            stop, newcomers = self.world.from_first((is_asked_to_stop(), self.rollouts.newcomers))
            is_last, ending = step + 1 == total, None
            try:
                self._share(step, outcome.stepped, newcomers)
            except ServersGone as error:
                ending = error
            self.run.record(
                {
                    "sync/version": self.rollouts.version,
                    **statistics(batch, self.world.data.group),
                }
            )
            self.run.finish(step)
            ending = ending or self.run.alarm(self._is_evaluated(step))
            if ending or stop or is_last or (step + 1) % every == 0:
                self._save(step + 1)  # what was learnt is kept, however the run ends
            if ending:
                raise ending
            if stop and not is_last:
                self.run.say(f"stopped on request after {step + 1} of {total} steps, saved")
                return False
        return True

    def _learn(self, step: int) -> tuple[Batch, Outcome]:
        """Samples a batch and learns from it."""
        run, learner = self.run, self.learner
        learner.faults.step = step
        try:
            with run.timed("rollout"):
                batch = learner.share(self.rollouts.collect(step))
        except ServersGone:
            self._save(step)  # nothing of this step has been learnt
            raise
        run.record(self.rollouts.counts)
        with run.timed("score"):
            batch = learner.score(batch)
        batch = learner.prepare(batch)
        run.record(mismatch.measure(batch, self.world.data.group))
        self.worst.keep(batch, step)
        if learner.replay:
            run.record({"mismatch/router_agreement": learner.replay.agreement()})
        with run.timed("update"):
            outcome = learner.update(batch, step)
        run.record(outcome.metrics)
        return batch, outcome

    def _share(self, step: int, stepped: bool, newcomers: bool) -> None:
        """Sends what was learnt to the servers, and asks them the held-out prompts where it is time."""
        if stepped or newcomers:
            with self.run.timed("sync"):
                self._publish(step + 1 if stepped else self.rollouts.version)
        if self._is_evaluated(step):
            with self.run.timed("eval"):
                self.accuracy, self.samples = self.rollouts.evaluate(self.held_out)
                suites = self.rollouts.evaluate_suites()
            self.run.record({"eval/accuracy": self.accuracy, **self.rollouts.counts, **suites})

    def _is_evaluated(self, step: int) -> bool:
        settings = self.recipe.trainer
        return (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps

    def _publish(self, version: int) -> None:
        """Sends the weights to the servers, and checks now and then that they got there."""
        is_first = self.rollouts.version is None
        self.run.record({"sync/bytes": self.rollouts.publish(self.learner.export, version)})
        when = self.recipe.sync.verify
        if when == "always" or (when == "first" and is_first):
            apart = self.rollouts.verify(self.learner.score)
            if apart is not None:
                self.run.record({"sync/verified_logprob_abs_mean": apart})

    def _save(self, step: int) -> None:
        """A checkpoint of `step` steps, unless there is one."""
        if self.world.from_first(any(found.step == step for found in available(self.saved))):
            return
        self.progress = replace(
            self.progress, step=step, version=self.rollouts.version, tokens=self.run.tokens
        )
        with self.run.timed("checkpoint"):  # counted with the next step
            checkpoint.save(self.learner, self.saved, self.progress, self.like)
            if self.world.is_first:
                settings = self.recipe.checkpoint
                prune(self.saved, settings.keep_last, settings.keep_every)

    def end(self) -> None:
        """Writes what was learnt as a Hugging Face folder, and the summary."""
        self.beat("the end of the run")
        self.run.save_samples("after", self.samples)
        self.learner.save(self.folder / "export", self.like)
        if self.recipe.learner.lora is not None:
            reference = str(self.folder / "reference")
            base = reference if self._adapts_a_warm_start else self.recipe.model.path
            self.learner.save_adapter(self.folder / "adapter", base or str(self.like))
        self.run.summarise(self.progress.accuracy_before, self.accuracy)
