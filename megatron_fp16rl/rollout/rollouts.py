"""Rollouts from servers: joins a collector or a stream for each leader with the publishing of weights."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch, Prompt, Sample
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.data.tasks import Task
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.spec import routing
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.background import Background
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.collector import Collected, Collector
from megatron_fp16rl.rollout.discovery import Discovery
from megatron_fp16rl.rollout.evaluation import Questions
from megatron_fp16rl.rollout.pool import NoServers, Pool
from megatron_fp16rl.rollout.recording import local_samples, set_aside, write_samples
from megatron_fp16rl.rollout.source import Evaluation, Metrics, Score
from megatron_fp16rl.rollout.stream import STREAM_FILES, Stream, stopped
from megatron_fp16rl.rollout.weight_sync import connect
from megatron_fp16rl.rollout.weight_sync.base import Weights
from megatron_fp16rl.rollout.weight_sync.publisher import Publisher, ServersGone
from megatron_fp16rl.utils.files import read_json, write_json

# If all servers are lost this often over the same requests, the requests are the cause.
MAX_COLLECT_RETRIES = 5
_VERIFIED_SEQUENCES = 8
_PROBE_S = 5
_METRICS_FILE = "metrics.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """The samples of a step: of this leader's replica (none on other ranks), and metrics of all."""

    step: int
    samples: list[Sample]
    metrics: Metrics


class Rollouts:
    """A RolloutSource. Every method is collective over the learner's ranks.

    If a leader has no server left, all ranks re-publish the current weights to all live servers;
    then that leader's requests resume.

    Between `begin` and `finish` a thread of each leader samples. It has pool, collector, stream and task to
    itself, and takes part in no collective.
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
        self.record = folder / "rollouts" if settings.record else None
        self.collector = Collector(
            settings,
            task,
            self.pool,
            recipe.trainer.seed,
            data.rank,
            data.size,
            routing(load_config(hf_dir)) if settings.router_replay else None,
            self.record,
        )
        is_streamed = settings.ahead > 1 or task.environment is not None
        self.stream = Stream(self.collector, recipe.trainer.steps) if is_streamed else None
        self.suites: list[Questions] = []
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
            world,
        )
        discovery = Discovery(registry, settings, lambda e: Client(e, _PROBE_S).responds)
        self.publisher = Publisher(world, transport, discovery, self.pool, waiting)
        self._background = Background("rollouts")
        self._begun: int | None = None  # the step that is sampled in the background
        # Its work on a leader, with the seconds that it takes, and what tells a stream to stop.
        self._job: Future[tuple[Collected, float]] | None = None
        self._stop: Future[None] = Future()
        self._drawn: Drawn | None = None  # a batch that waits for `collect`
        # The weights that may have sampled what is collected: of several versions if servers were lost.
        self._versions: set[int] = set()

    def collect(self, step: int) -> tuple[Batch | None, Metrics]:
        """See RolloutSource. Raises RewardError on every rank if too many responses of all replicas
        cannot be graded.
        """
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            drawn = self._draw(step, None)
        assert drawn.step == step
        return Batch.from_samples(drawn.samples) if drawn.samples else None, drawn.metrics

    def begin(self, step: int) -> None:
        """See RolloutSource."""
        self._begun = step
        if self.world.is_leader:
            self._renew()
            stop = self._stop = Future()
            # The learner will have one version more, if an update is not skipped.
            learnt = max(self._versions) + 1
            self._job = self._background.start(lambda: self._timed(step, learnt, stop))

    def finish(self, version: int) -> None:
        """See RolloutSource. Raises as `collect` does."""
        step, self._begun = self._begun, None
        if step is not None:
            self._drawn = self._draw(step, version)

    def save(self, folder: Path) -> None:
        """See RolloutSource. A file for each leader, which can be read at another layout."""
        if self.stream is not None and self.world.is_leader:
            self.stream.save(folder)
        if (drawn := self._drawn) is None:
            return
        if drawn.samples:
            write_samples(folder, drawn.step, self.world.data.rank, drawn.samples)
        if self.world.is_rank0:
            write_json(folder / _METRICS_FILE, drawn.metrics)

    def restore(self, folder: Path, step: int) -> None:
        """See RolloutSource."""
        if self.stream is not None and self.world.is_leader:
            self.stream.restore(folder)
        if self.stream is None and self.world.is_rank0 and any(folder.glob(STREAM_FILES)):
            print(
                "the checkpoint has prompts in flight, of rollout.ahead above 1: they are dropped, and "
                "some that were learnt already may be sampled again",
                flush=True,
            )
        in_hand = (folder / _METRICS_FILE).exists()
        if self.world.is_rank0 and self.record is not None:
            set_aside(self.record, step + in_hand)
        if not in_hand:
            return
        samples: list[Sample] = []
        if self.world.is_leader:
            samples = local_samples(folder, step, self.recipe.rollout, self.world.data)
        self._drawn = Drawn(step, samples, read_json(folder / _METRICS_FILE))

    def rescore(self, batch: Batch) -> Batch | None:
        """See RolloutSource."""
        rescored, _ = self._with_servers(
            lambda: self.collector.rescore(batch) if self.world.is_leader else None
        )
        return rescored

    def _draw(self, step: int, version: int | None) -> Drawn:
        """The samples of a step: those that `begin` began, or else drawn now. version: see _with_servers."""
        seconds: list[float] = []

        def work() -> Collected | None:
            if not self.world.is_leader:
                return None
            job, self._job = self._job, None
            if job is None:
                return self._sample(step, max(self._versions), stopped())
            self._stop.set_result(None)
            collected, took = job.result()
            seconds.append(took)
            return collected

        collected, resent = self._with_servers(work, version)
        tally = collected.tally if collected else GradingStats()
        own = {**collected.counts, "rollout/resent_requests": resent} if collected else {}
        # Every rank gets the counts of all leaders, so that all of them fail if too many errors occurred.
        ready = self.stream.ready if self.stream else 0
        counts = self.world.broadcast_from_leader((tally, own, ready))
        tallies, parts, readies = zip(*self.world.gather(counts, self.world.data), strict=True)
        if self.stream:
            self.stream.adapt(min(readies))
        metrics: Metrics = {
            **self._grading("reward", sum(tallies, GradingStats())),
            **{name: sum(part[name] for part in parts) for name in parts[0]},
            "rollout/servers": len(self.publisher.members),
        }
        if "rollout/turn_tokens" in metrics:
            # Of what later turns send again, the share that the servers did not have to run again. None before
            # any sample has a second turn: a gate must not take the metric for misspelt.
            tokens, cached = (metrics[f"rollout/{of}_tokens"] or 0 for of in ("turn", "cached"))
            metrics["rollout/cached_tokens_share"] = cached / tokens if tokens else None
        if seconds:  # in the background; else it is the time that the learner waited
            metrics["time/rollout_s"] = seconds[0]
        return Drawn(step, collected.samples if collected else [], metrics)

    def _timed(self, step: int, learnt: int, stop: "Future[None]") -> tuple[Collected, float]:
        began = time.monotonic()
        return self._sample(step, learnt, stop), time.monotonic() - began

    def _sample(self, step: int, learnt: int, stop: "Future[None]") -> Collected:
        """A leader's samples. learnt: the newest version that the learner may have when it learns them.

        stop: of a stream, which goes on until then.
        """
        if self.stream is None:
            return self.collector.collect(step, self._versions)
        if (
            self.recipe.rollout.ahead <= 1
        ):  # the prompts of a step and no more: there is nothing to stop
            stop = stopped()
        return self.stream.collect(step, max(self._versions), learnt, stop)

    def has_new_servers(self) -> bool:
        return self.publisher.has_new_servers()

    def publish(self, weights: Weights, version: int) -> int:
        """See RolloutSource. Raises ServersGone."""
        return self.publisher.publish(weights, version)

    def verify(self, score: Score) -> float | None:
        """See RolloutSource. Raises SyncMismatch."""
        task, multiple = self.task, self.recipe.learner.sequences_multiple
        count = -(-_VERIFIED_SEQUENCES // multiple) * multiple
        prompts = task.held_out_prompts(count) or task.all_training_prompts(count)
        precision = self.recipe.precision
        # Where a task has fewer, some come twice.
        count = -(-len(prompts) // multiple) * multiple
        sequences = [prompt.ids for prompt in islice(cycle(prompts), count)]
        return self.publisher.verify(score, sequences, (precision.dtype, precision.served))

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        """See RolloutSource. Raises RewardError if too many responses cannot be graded."""
        if not prompts:
            return Evaluation(metrics={"eval/accuracy": None})
        collected, _ = self._with_servers(
            lambda: (
                self.collector.held_out(prompts, self._versions) if self.world.is_rank0 else None
            )
        )
        samples, tally = (collected.samples, collected.tally) if collected else ([], GradingStats())
        mean = sum(sample.reward for sample in samples) / len(prompts)
        mean, tally = self.world.broadcast_from_rank0((mean, tally))
        metrics = {"eval/accuracy": mean, **self._grading("eval", tally)}
        return Evaluation(mean, samples, metrics)

    def evaluate_suites(self) -> Metrics:
        seed = self.recipe.trainer.seed if self.recipe.rollout.deterministic else None

        def measure() -> Metrics:
            metrics: Metrics = {}
            for suite in self.suites:  # rank 0 alone has them
                metrics.update(suite.measure(self.pool, seed))
            return metrics

        metrics, _ = self._with_servers(measure)
        return self.world.broadcast_from_rank0(metrics)

    def _renew(self) -> None:
        """The next requests are new ones, to servers that all have the version published last."""
        version = self.publisher.version
        assert version is not None, "nothing is published yet"
        self._versions = {version}
        self.pool.replay()

    def _with_servers(self, work: Callable[[], T], version: int | None = None) -> tuple[T, int]:
        """Runs `work` until no leader lacks servers. Returns its result, and how many of its requests
        were sent again.

        version: of the learner's weights, which are published again if a leader has no server left; None:
        the version published last. Raises ServersGone on all ranks if no server comes, or if all are
        lost too often.
        """
        if self._job is None:  # else `begin` did
            self._renew()
        if version is None:
            version = self.publisher.version
        assert version is not None
        results: list[T] = []
        for _ in range(MAX_COLLECT_RETRIES):
            lost = False
            if not results:
                try:
                    results.append(work())
                except NoServers:
                    lost = True
            # One leader without servers is enough: publishing takes all ranks.
            if not self._on_any_rank(lost):
                break
            self.publisher.republish(version)
            self._versions.add(version)
            self.pool.replay()
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
