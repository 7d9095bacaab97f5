"""The loop: sample with SGLang, score and learn with Megatron, send the weights back."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.checks import check_held_out
from megatron_fp16rl.comparison import COMPARE_EVERY, Comparison
from megatron_fp16rl.data.batch import TrainBatch, statistics
from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.learner import checkpoint
from megatron_fp16rl.learner.background import Saver
from megatron_fp16rl.learner.changes import Changes
from megatron_fp16rl.learner.checkpoint import Progress
from megatron_fp16rl.learner.checkpoint_files import Damaged, available, set_aside
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.metrics.run import Run
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.parallel import World, initialize
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.recording import Replay
from megatron_fp16rl.rollout.rollouts import Rollouts
from megatron_fp16rl.rollout.source import Evaluation, RolloutSource
from megatron_fp16rl.rollout.weight_sync.publisher import ServersGone
from megatron_fp16rl.utils.watchdog import Watchdog
from megatron_fp16rl.warm_start import warm_start

_ROLLOUTS = "rollouts"  # folder of a checkpoint: the batch that was sampled ahead


def train(
    recipe: Recipe,
    folder: Path,
    servers: Path,
    watchdog: Watchdog | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs one learner rank from start to end; the launcher starts as many as the recipe has.

    folder: the run directory. servers: the folder in which rollout servers register. Returns whether
    all steps are done: False if a stop was requested, and a checkpoint saved.
    """
    # The watchdog must fire before the collective timeout: its report is more useful.
    timeout_s = max(1800, 2 * (recipe.trainer.step_timeout_s or 0))
    timeout_s += max(recipe.rollout.start_timeout_s, recipe.rollout.wait_for_servers_s)
    os.environ.update(nccl.agreed(recipe.rollout))
    world = initialize(recipe.learner, recipe.trainer.seed, timeout_s)
    trainer = Trainer(recipe, folder, servers, world, watchdog or Watchdog.idle())
    with trainer.run:
        evaluation = trainer.begin()
        gc.collect()
        gc.freeze()  # a full collection over all imported modules would stop a step for half a second
        done, evaluation = trainer.loop(evaluation, stop_requested)
        if done:
            trainer.finish(evaluation)
    # After the barrier every rank may leave: all have written their files. No process group is destroyed:
    # NCCL would wait for every process of a node, the servers among them, which go on.
    dist.barrier()
    return done


class Trainer:
    """One rank's run. Every method is collective over the world."""

    def __init__(
        self, recipe: Recipe, folder: Path, servers: Path, world: World, watchdog: Watchdog
    ) -> None:
        """Builds the learner, with initial weights or those of a checkpoint. Starts no rollout yet."""
        self.recipe, self.folder, self.world, self.watchdog = recipe, folder, world, watchdog
        self.run = Run(recipe, folder, world)
        self.run.say(f"learner: {world.size} rank(s), {platform.current().describe()}")
        self.hf_folder = model_folder(recipe.model)
        self.tokenizer = load_tokenizer(self.hf_folder)
        self.task = make(recipe.task, self.tokenizer, recipe.trainer.seed)
        self.run.say(f"task: {self.task.description}")
        check_held_out(recipe, len(self.task.held_out_prompts(1)))
        self.learner = Learner.from_recipe(recipe, self.hf_folder, world)
        if kernel := self.learner.forward.attention.kernel(recipe.rollout.max_new_tokens):
            self.run.say(f"attention: {kernel}")
        self.checkpoints, self.saver = folder / "checkpoints", Saver(world, recipe.checkpoint)
        self.resumed = bool(world.broadcast_from_rank0(available(self.checkpoints)))
        self.progress = self._restore() if self.resumed else self._start()
        self.version = self.progress.version  # of the learner's weights
        self.comparison = Comparison(recipe, self.learner)
        self.changes = Changes(self.learner.exported) if recipe.sync.count_changes else None
        if recipe.rollout.replay is None:
            self.rollouts: RolloutSource = Rollouts(
                recipe, self.task, world, servers, self.hf_folder, folder, watchdog.waiting
            )
        else:
            self.rollouts = Replay(recipe, world)
        if self.resumed:
            newest = self.checkpoints / f"step_{self.progress.step}"
            self.rollouts.restore(newest / _ROLLOUTS, self.progress.step)
        self.held_out = self.task.held_out_prompts(recipe.trainer.eval_prompts)

    def begin(self) -> Evaluation:
        """Waits for the servers, sends them the weights, and evaluates before the first step."""
        self.watchdog.beat("the first weight sync and evaluation")
        self._sync(is_first=True)
        evaluation = self.rollouts.evaluate(self.held_out)
        if not self.resumed:
            self.progress = replace(self.progress, accuracy_before=evaluation.accuracy)
            self.run.save_samples("before", evaluation.samples)
        if evaluation.accuracy is not None:
            count = len(self.held_out)
            self.run.say(f"held-out accuracy: {evaluation.accuracy:.3f} ({count} prompts)")
        return evaluation

    def loop(
        self, evaluation: Evaluation, stop_requested: Callable[[], bool]
    ) -> tuple[bool, Evaluation]:
        """Runs the remaining steps. Returns whether all are done, and the last evaluation."""
        run, learner, rollouts, comparison = self.run, self.learner, self.rollouts, self.comparison
        policy = RunPolicy(self, stop_requested)

        for step in run.steps(self.progress.step):
            self.watchdog.beat(f"step {step + 1}")
            learner.begin_step(step)

            # 1. Rollout: the batch that was sampled while earlier steps learnt (ahead: 1 and more), or one
            #    sampled now (ahead: 0), and graded. The leader of each model replica collects the replica's
            #    share, then all its ranks get it: they must see the same tokens.
            with run.timed("rollout_wait"), policy.save_if_servers_are_gone(step):
                rollout, metrics = rollouts.collect(step)
                batch = learner.share(rollout)
            run.record(metrics)
            if policy.samples_ahead(step):
                rollouts.begin(step + 1)  # with the weights published last: those of `learner` now

            # 2. Score the same tokens under the learner's policy, where the loss or a metric needs it. On
            #    policy both engines have the same weights: the mismatch is what they round differently.
            with run.timed("score"):
                batch = learner.score(batch) if comparison.scores(step) else batch.scored(None)
            # 3. Advantages, from the rewards of all responses to a prompt.
            batch = learner.prepare(batch)
            run.record(comparison.before_update(batch, step))

            # 4. Update: one pass over the batch, in one or more optimizer updates. An FP16 overflow skips
            #    an update on every rank; stepped: at least one was not skipped.
            with run.timed("update"):
                outcome = learner.update(batch, step)
            run.record(outcome.metrics)
            run.record(comparison.after_update(batch, outcome, self.version))
            if outcome.stepped:
                # Before anything is sent: should all servers be lost now, the checkpoint has the number.
                self.version += 1

            with policy.fail_after_this_step():
                # 5. Sync: only if the weights changed, or a server came (back) without them. A step whose
                #    updates were all skipped has no new version. The next batch comes in first, and what still
                #    runs (ahead: 2 and more) is aborted, so that no request is of two versions.
                with run.timed("rollout_wait"):
                    rollouts.finish(self.version)
                if outcome.stepped or rollouts.has_new_servers():
                    with run.timed("sync"):
                        self._sync()

                # 6. Evaluate on held-out prompts, with the weights just published.
                if policy.evaluates(step):
                    evaluation = self._evaluate()
                if policy.compares(step):
                    self._compare_again(batch)

            # 7. Log the step before anything can end the run; then save, stop or fail.
            run.record({"sync/version": self.version, **statistics(batch, self.world.data.group)})
            run.finish(step)
            if not policy.goes_on(step):
                return False, evaluation
        return True, evaluation

    def finish(self, evaluation: Evaluation) -> None:
        """Writes the learnt weights as a Hugging Face folder, and the summary."""
        self.watchdog.beat("the end of the run")
        self.run.save_samples("after", evaluation.samples)
        self.learner.save(self.folder / "export", self.hf_folder)
        if self.recipe.learner.lora is not None:
            reference = str(self.folder / "reference")
            base = reference if self._adapts_a_warm_start else self.recipe.model.path
            self.learner.save_adapter(self.folder / "adapter", base or str(self.hf_folder))
        self.run.summarise(self.progress.accuracy_before, evaluation.accuracy)

    def save(self, step: int, wait: bool) -> None:
        """Saves a checkpoint of `step` steps, unless there is one. wait: until it is whole."""
        with self.run.timed("checkpoint"):  # counted with the next step
            self.saver.end(wait=True)
            if self.world.broadcast_from_rank0(
                any(c.step == step for c in available(self.checkpoints))
            ):
                return
            self.progress = replace(
                self.progress, step=step, version=self.version, tokens=self.run.tokens
            )
            self.saver.begin(
                *(self.learner, self.checkpoints, self.progress, self.hf_folder),
                lambda path: self.rollouts.save(path / _ROLLOUTS),
            )
            self.saver.end(wait)

    def _start(self) -> Progress:
        self.run.resume(0, 0)  # an earlier attempt may have written metrics
        recipe, learner = self.recipe, self.learner
        if recipe.warm_start is not None:
            warm_start(
                *(recipe, learner, self.task, self.hf_folder, self.run),
                self.watchdog.beat,
            )
        if recipe.algorithm.keeps_reference or self._adapts_a_warm_start:
            learner.save(self.folder / "reference", self.hf_folder)
        if recipe.algorithm.keeps_reference:
            learner.keep_reference()
        return Progress(step=0, version=0)

    def _restore(self) -> Progress:
        """Resumes from the newest intact checkpoint; sets damaged ones aside, and names them."""
        if self.recipe.algorithm.keeps_reference:
            self.learner.load(self.folder / "reference")
            self.learner.keep_reference()
        while True:
            newest, *older = self.world.broadcast_from_rank0(available(self.checkpoints))
            try:
                progress = checkpoint.load(self.learner, newest)
            except Damaged as damage:
                if not older:
                    raise
                self.run.say(f"{damage.what}; set aside, going on from {older[0].path}")
                if self.world.is_rank0:
                    set_aside(newest)
                continue
            self.run.resume(progress.step, progress.tokens)
            steps = self.recipe.trainer.steps
            self.run.say(f"resumed from {newest.path}: {progress.step} of {steps} steps done")
            return progress

    def _evaluate(self) -> Evaluation:
        """Samples the held-out prompts and the suites."""
        with self.run.timed("eval"):
            evaluation = self.rollouts.evaluate(self.held_out)
            suites = self.rollouts.evaluate_suites()
        self.run.record({**evaluation.metrics, **suites})
        return evaluation

    def _compare_again(self, batch: TrainBatch) -> None:
        """Records mismatch/* of a few sequences that the servers score again with the weights published now."""
        with self.run.timed("eval"):
            rescored = self.learner.share(self.rollouts.rescore(self.comparison.few(batch)))
            self.run.record(self.comparison.of_rescored(rescored))

    @property
    def _adapts_a_warm_start(self) -> bool:
        """Whether the adapters belong to weights that only this run has."""
        return self.recipe.learner.lora is not None and self.recipe.warm_start is not None

    def _verifies(self, is_first: bool) -> bool:
        """Whether the servers' log-probs are compared after this sync."""
        when = self.recipe.sync.verify
        if isinstance(when, int):
            return is_first or self.version % when == 0
        return when == "always" or (when == "first" and is_first)

    def _sync(self, is_first: bool = False) -> None:
        """Sends the weights to the servers; verifies them there where the recipe says so."""
        # 1. The weights, to every server that is alive; each answers requests under the new number only.
        self.run.record({"sync/bytes": self.rollouts.publish(self.learner.exported, self.version)})
        if self.changes:
            self.run.record({"sync/changed_fraction": self.changes.count()})
        # 2. The check: a mapping error would not fail, it would only train on another policy's samples.
        if self._verifies(is_first):
            difference = self.rollouts.verify(self.learner.score)
            if difference is not None:
                self.run.record({"sync/verified_logprob_abs_mean": difference})


class RunPolicy:
    """When a run evaluates, saves, stops and fails. Whatever ends it, completed steps are saved first."""

    def __init__(self, trainer: Trainer, stop_requested: Callable[[], bool]) -> None:
        self.trainer, self.stop_requested = trainer, stop_requested
        self._failure: Exception | None = None  # of this step, raised at its end

    def samples_ahead(self, step: int) -> bool:
        """Whether the next step is sampled while this one is learnt."""
        recipe = self.trainer.recipe
        return bool(recipe.rollout.ahead) and step + 1 < recipe.trainer.steps

    def compares(self, step: int) -> bool:
        """Whether servers score sequences again after this step: what on-policy batches tell for free."""
        settings = self.trainer.recipe.rollout
        is_due = step % COMPARE_EVERY == 0 or self.evaluates(step)
        return bool(settings.ahead) and settings.replay is None and is_due

    def evaluates(self, step: int) -> bool:
        """Whether the held-out prompts are sampled after this step."""
        settings = self.trainer.recipe.trainer
        return (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps

    @contextmanager
    def save_if_servers_are_gone(self, step: int) -> Iterator[None]:
        """Nothing of this step is learnt yet: the checkpoint is of the steps before."""
        try:
            yield
        except ServersGone:
            self.trainer.save(step, wait=True)
            raise

    @contextmanager
    def fail_after_this_step(self) -> Iterator[None]:
        """The step is learnt already: it is logged and saved before the loss of all servers ends the run."""
        try:
            yield
        except ServersGone as error:
            self._failure = error

    def goes_on(self, step: int) -> bool:
        """Saves where it is due. Returns False to stop on request; raises what ends the run."""
        trainer, run = self.trainer, self.trainer.run
        total, every = trainer.recipe.trainer.steps, trainer.recipe.checkpoint.every
        stop = trainer.world.broadcast_from_rank0(self.stop_requested())
        failure = self._failure or run.check_gates(self.evaluates(step))
        is_last = step + 1 == total
        ends = bool(failure or stop or is_last)
        with run.timed("checkpoint"):
            trainer.saver.end(wait=False)
        if ends or (step + 1) % every == 0:
            trainer.save(step + 1, wait=ends)
        if failure:
            raise failure
        if stop and not is_last:
            run.say(f"stopped on request after {step + 1} of {total} steps, saved")
        return is_last or not stop
