"""Rollouts from servers: joins a collector for each leader with the publishing of weights."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch, Prompt
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.data.tasks import Task
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.spec import routing
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.collector import Collector
from megatron_fp16rl.rollout.discovery import Discovery
from megatron_fp16rl.rollout.evaluation import Questions
from megatron_fp16rl.rollout.pool import NoServers, Pool
from megatron_fp16rl.rollout.source import Evaluation, Metrics, Score
from megatron_fp16rl.rollout.weight_sync import connect
from megatron_fp16rl.rollout.weight_sync.base import Export, GatherOnly, Transport
from megatron_fp16rl.rollout.weight_sync.publisher import Publisher, ServersGone

# If all servers are lost this often over the same requests, the requests are the cause.
MAX_COLLECT_RETRIES = 5
_VERIFIED_SEQUENCES = 8
_PROBE_S = 5
T = TypeVar("T")


class Rollouts:
    """A RolloutSource. Every method is collective over the learner's ranks.

    If a leader has no server left, all ranks re-publish the current weights to all live servers;
    then that leader's requests resume.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        world: World,
        registry: Path,
        hf_dir: Path,
        folder: Path,
        waiting: Callable[[float], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """registry: the folder in which servers register. folder: the run directory.

        hf_dir: the model's Hugging Face folder. waiting: context manager that pauses the watchdog for
        up to N seconds while ranks wait for a server.
        """
        self.recipe, self.task, self.world = recipe, task, world
        settings, data = recipe.rollout, world.data
        self.pool = Pool(settings.request_timeout_s, data.rank / data.size)
        self.collector = Collector(
            settings,
            task,
            self.pool,
            recipe.trainer.seed,
            data.rank,
            data.size,
            routing(load_config(hf_dir)) if settings.router_replay else None,
            folder / "rollouts" if settings.record else None,
        )
        self.suites: list[Questions] = []
        transport: Transport = GatherOnly()
        if world.is_rank0:
            self.suites = [
                Questions.of(suite, recipe, task.tokenizer, recipe.trainer.seed)
                for suite in recipe.trainer.suites
            ]
            transport = connect(
                recipe.sync,
                settings.tensor_parallel,
                os.environ.get("MASTER_ADDR", settings.host),  # rank 0's address
                hf_dir,
                folder / "scratch",
                recipe.precision.served,
            )
        discovery = Discovery(registry, settings, lambda e: Client(e, _PROBE_S).responds)
        self.publisher = Publisher(world, transport, discovery, self.pool, waiting)

    def collect(self, step: int) -> tuple[Batch | None, Metrics]:
        """See RolloutSource. Raises RewardError on every rank if too many responses of all replicas
        cannot be graded.
        """
        collected, resent = self._with_servers(
            lambda version: self.collector.collect(step, version) if self.world.is_leader else None
        )
        batch = None if collected is None else Batch.from_samples(collected.samples)
        tally, replaced = (
            (collected.tally, collected.replaced) if collected else (GradingStats(), 0)
        )
        # Every rank gets the counts of all leaders, so that all of them fail if too many errors occurred.
        counts = self.world.broadcast_from_leader((tally, replaced, resent))
        tallies, replacements, resends = zip(
            *self.world.gather(counts, self.world.data), strict=True
        )
        metrics = {
            **self._grading("reward", sum(tallies, GradingStats())),
            "rollout/refilled_prompts": sum(replacements),
            "rollout/resent_requests": sum(resends),
            "rollout/servers": len(self.publisher.members),
        }
        return batch, metrics

    def has_new_servers(self) -> bool:
        return self.publisher.has_new_servers()

    def publish(self, export: Export, version: int) -> int:
        """See RolloutSource. Raises ServersGone."""
        return self.publisher.publish(export, version)

    def verify(self, score: Score) -> float | None:
        """See RolloutSource. Raises SyncMismatch."""
        task, count = self.task, _VERIFIED_SEQUENCES
        prompts = task.held_out_prompts(count) or task.all_training_prompts(count)
        precision = self.recipe.precision
        sequences = [prompt.ids for prompt in prompts]
        return self.publisher.verify(score, sequences, (precision.dtype, precision.served))

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        """See RolloutSource. Raises RewardError if too many responses cannot be graded."""
        if not prompts:
            return Evaluation(metrics={"eval/accuracy": None})
        collected, _ = self._with_servers(
            lambda version: (
                self.collector.held_out(prompts, version) if self.world.is_rank0 else None
            )
        )
        samples, tally = (collected.samples, collected.tally) if collected else ([], GradingStats())
        mean = sum(sample.reward for sample in samples) / len(prompts)
        mean, tally = self.world.broadcast_from_rank0((mean, tally))
        metrics = {"eval/accuracy": mean, **self._grading("eval", tally)}
        return Evaluation(mean, samples, metrics)

    def evaluate_suites(self) -> Metrics:
        seed = self.recipe.trainer.seed if self.recipe.rollout.deterministic else None

        def measure(_: int) -> Metrics:
            metrics: Metrics = {}
            for suite in self.suites:  # rank 0 alone has them
                metrics.update(suite.measure(self.pool, seed))
            return metrics

        metrics, _ = self._with_servers(measure)
        return self.world.broadcast_from_rank0(metrics)

    def _with_servers(self, work: Callable[[int], T]) -> tuple[T, int]:
        """Runs `work(version)` until no leader lacks servers. Returns its result, and how many of its
        requests were sent again.

        Raises ServersGone on all ranks if no server comes, or if all are lost too often.
        """
        version = self.publisher.version
        assert version is not None, "nothing is published yet"
        results: list[T] = []
        for _ in range(MAX_COLLECT_RETRIES):
            lost = False
            if not results:
                try:
                    self.pool.replay()
                    results.append(work(version))
                except NoServers:
                    lost = True
            # One leader without servers is enough: publishing takes all ranks.
            if not self._on_any_rank(lost):
                break
            self.publisher.republish()
        else:
            raise ServersGone(
                f"all rollout servers were lost {MAX_COLLECT_RETRIES} times over the same requests; "
                "the logs of the ranks say of what (is lost: ...); see also rollout.request_timeout_s"
            )
        resent = self.pool.resent
        self.pool.clear()
        lacking = len(self.pool.clients) < len(self.publisher.members)
        self.publisher.discovery.unsure = self._on_any_rank(lacking)
        return results[0], resent

    def _on_any_rank(self, flag: bool) -> bool:
        flags = torch.tensor(float(flag), device=self.world.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def _grading(self, part: str, tally: GradingStats) -> Metrics:
        """Metrics of how grading went. Raises RewardError if too many responses could not be graded."""
        if tally.errors and self.world.is_rank0:
            print(
                f"{part}: {tally.errors} of {tally.graded} responses could not be graded and earn 0; "
                f"the first error: {tally.first_error}",
                flush=True,
            )
        tally.check(self.task.max_error_fraction)
        return {f"{part}/timeouts": tally.timeouts, f"{part}/errors": tally.errors}
