"""What the training loop asks of the rollout servers: collect a batch, publish weights, evaluate."""

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, ScoredBatch
from megatron_fp16rl.data.rewards import Tally
from megatron_fp16rl.data.tasks import Task, templates
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.families import Routing, routing
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.client import Client, Generation, Sampling, ServerError, ServerLost
from megatron_fp16rl.rollout.discovery import Endpoint, all_failed, registered
from megatron_fp16rl.rollout.evaluation.online import Online
from megatron_fp16rl.rollout.pool import NoServers, Pool
from megatron_fp16rl.rollout.recording import write_samples
from megatron_fp16rl.rollout.refill import collect_with_signal
from megatron_fp16rl.rollout.results import Evaluation, Metrics
from megatron_fp16rl.rollout.weight_sync import transport
from megatron_fp16rl.rollout.weight_sync.group import SyncFailed
from megatron_fp16rl.utils.errors import FinalError

_VERIFIED_SEQUENCES = 8
# Mean |dlogp| between the engines seen on real and tiny models is 10 to 100 times below; wrong
# weights give more than 1.
_ROUNDING = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}


_TRIES = 3  # of one publish; servers that make it fail are left out of the next if there are others
_ROUNDS = 5  # of one collection: what takes down all servers again and again is at fault itself
T = TypeVar("T")


class ServersGone(FinalError):
    """No rollout server came up, or back, in time."""


class SyncMismatch(FinalError):
    """The servers do not compute what the learner computes."""


class Rollouts:
    """The servers, as one learner rank sees them. Every method is collective over the world.

    Servers may die and come back. Those that have the weights are the pool's, the same on all
    leaders; who comes back joins at the next publish. If a leader has none left, all ranks publish
    the same weights again, to whom there is then, and its work goes on.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        world: World,
        servers: Path,
        like: Path,
        folder: Path,
        waiting: Callable[[float], AbstractContextManager] = nullcontext,
    ) -> None:
        """servers: the folder in which they are registered; folder: the run directory.

        waiting: told how many seconds it may take until a server comes, while ranks wait for one.
        """
        self.recipe, self.task, self.world, self.servers = recipe, task, world, servers
        self.waiting = waiting
        self.version: int | None = None  # that the servers have
        self.record = folder / "rollouts" if recipe.rollout.record else None
        settings = recipe.rollout
        self.pool = Pool(settings.request_timeout_s, world.data.rank / world.data.size)
        self.routing = routing(load_config(like)) if settings.router_replay else None
        self._export: Callable[[], transport.Stream] | None = None
        self._members: list[Endpoint] = []  # that the weights were sent to
        self._left_out: list[Endpoint] = []  # that made this publish fail
        self._lost = False  # whether some leader has lost a server since
        self.suites: list[Online] = []
        self.transport: transport.Transport | None = None
        if world.is_rank0:
            self.suites = [Online.of(s, recipe, task.tokenizer) for s in recipe.trainer.suites]
            self.transport = transport.connect(
                recipe.sync,
                settings.tensor_parallel,
                self._host(),
                like,
                folder / "scratch",
                recipe.precision.served,
            )

    def _host(self) -> str:
        """This rank's address, for the servers: MASTER_ADDR is rank 0's."""
        return os.environ.get("MASTER_ADDR", self.recipe.rollout.host)

    def collect(self, step: int) -> tuple[Batch | None, Metrics]:
        """Samples this replica's share of a step's prompts; its leader alone has them, on the host.

        Returns them, and metrics of all replicas. Raises RewardError on every rank if too many of all replicas' responses cannot be graded.
        """
        batch, tally, refilled = None, None, 0
        drawn, resent = self._survive(lambda: self._draw(step) if self.world.is_leader else None)
        if drawn is not None:
            samples, tally, refilled = drawn
            if self.record is not None:
                write_samples(self.record, step, self.world.data.rank, samples)
            batch = Batch.from_samples(samples)
        tally, refilled = self.world.broadcast_from_leader((tally, refilled))
        found = self._of_all_replicas((tally, refilled, resent))
        tallies, refills, resends = zip(*found, strict=True)
        metrics = self._account("reward", sum(tallies, Tally()))
        metrics["rollout/refilled_prompts"] = sum(refills)
        metrics["rollout/resent_requests"] = sum(resends)
        metrics["rollout/servers"] = len(self._members)
        return batch, metrics

    def _draw(self, step: int) -> tuple[list[Sample], Tally, int]:
        """Samples of this rank's prompts, how grading went, and how many prompts gave way to others."""
        settings, data = self.recipe.rollout, self.world.data
        count, share = settings.prompts, settings.prompts // data.size
        attempts = 1 + settings.refill_rounds
        prompts = self.task.training_prompts(step, count * attempts)
        tally = Tally()

        def draw(asked: list[tuple[int, Prompt]], attempt: int) -> list[Sample]:
            nonlocal tally
            purpose = f"step {step} attempt {attempt}"
            samples, more = self._sample(asked, settings.samples, purpose, self.routing)
            tally += more
            return samples

        samples, refilled = collect_with_signal(
            [prompts[i * count : (i + 1) * count] for i in range(attempts)],
            range(data.rank * share, (data.rank + 1) * share),
            draw,
        )
        return samples, tally, refilled

    def publish(self, export: Callable[[], transport.Stream], version: int) -> int:
        """Puts weights into every server, under `version`. Returns the bytes sent to each.

        export: as Learner.export, which takes all ranks, and is asked again if a server fails in the
        middle. Raises ServersGone.
        """
        self._export, self.version, self._left_out = export, version, []
        for _ in range(_TRIES):
            endpoints = self._find_servers()
            sent, failure = self._send(endpoints)
            if failure is None:
                self._admit(endpoints)
                return sent
        raise ServersGone(
            f"weights of version {version} could not be sent in {_TRIES} tries; the last: {failure}"
        )

    def _admit(self, endpoints: list[Endpoint]) -> None:
        """Takes the servers that have the weights for the pool."""
        if self.world.is_rank0 and self._members and len(endpoints) != len(self._members):
            wanted = self.recipe.rollout.servers
            print(f"version {self.version} is on {len(endpoints)} of {wanted} servers", flush=True)
        self._members, self._lost = endpoints, False
        self.pool.join(endpoints)

    def _send(self, endpoints: list[Endpoint]) -> tuple[int, str | None]:
        """One try to publish: the bytes sent to each, and why it failed if it did. Collective."""
        tensors, sent, failure = self._export(), 0, None
        if self.transport is not None:
            self.pool.join(endpoints)
            clients = list(self.pool.clients)
            try:
                sent = self.transport.send(tensors, str(self.version), clients)
            except (ServerError, SyncFailed) as error:
                failure = str(error)
            # Only now: the error's traceback keeps the store alive in which servers wait for others.
            if failure is not None:
                self._leave_out(clients, failure)
        for _ in tensors:
            pass  # what others gather with this rank
        return self.world.broadcast_from_rank0((sent, failure))

    def _leave_out(self, clients: list[Client], failure: str) -> None:
        """Whom the next try goes without. The next publish asks them again."""
        left = self.transport.survivors(clients)
        lost = [client for client in clients if client not in left]
        self._left_out += [client.endpoint for client in lost]
        print(
            f"publishing version {self.version} failed: {failure}\nto be tried again "
            f"with {len(left)} server(s), without {len(lost)}",
            flush=True,
        )

    def _find_servers(self) -> list[Endpoint]:
        """Whom to publish to: at first all, then whoever is there; the same on every rank."""
        settings, is_first = self.recipe.rollout, self.world.is_rank0
        found = self.world.broadcast_from_rank0(self._enough_servers() if is_first else None)
        if found is None:
            first = not self._members
            patience = settings.start_timeout_s if first else settings.wait_for_servers_s
            with self.waiting(patience):
                found = self.world.broadcast_from_rank0(
                    self._await_servers(patience) if is_first else None
                )
        if not found:
            raise ServersGone(
                f"no rollout server is registered in {self.servers}; see logs/ for why they ended"
            )
        return found

    def _await_servers(self, patience_s: float) -> list[Endpoint]:
        """Those that are there when there are enough, or none is to come."""
        if self._members:
            print(f"no rollout server is left: waiting {patience_s:.0f} s for one", flush=True)
        deadline = time.monotonic() + patience_s
        while (found := self._enough_servers()) is None:
            if time.monotonic() > deadline:
                return self._servers_there()
            time.sleep(0.2)
        return found

    def _enough_servers(self) -> list[Endpoint] | None:
        """Those that are there; None while there are too few, and others may come."""
        there = self._servers_there()
        first = not self._members and not self._left_out
        enough = self.recipe.rollout.servers if first else 1
        return there if len(there) >= enough or all_failed(self.servers) else None

    def _servers_there(self) -> list[Endpoint]:
        everyone = registered(self.servers)
        there = [e for e in everyone if e not in self._left_out] or everyone
        if self._left_out or (self._members and (self._lost or there != self._members)):
            there = self._responding(there)
        return there

    def _responding(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        """Those whose scheduler answers: one that hangs would hold up the whole group."""
        with ThreadPoolExecutor(max(1, len(endpoints))) as threads:
            answers = threads.map(lambda endpoint: Client(endpoint, 5).responds, endpoints)
            found = [e for e, answer in zip(endpoints, answers, strict=True) if answer]
        for endpoint in found:
            if endpoint not in self._members:
                print(f"rollout server {endpoint.url} joins", flush=True)
        return found

    def _survive(self, work: Callable[[], T]) -> tuple[T, int]:
        """What `work` returns, and how many of its requests were sent again. Collective.

        Where it ends for want of servers, all publish the weights again and it goes on. Raises
        ServersGone on all ranks if no server comes, or if all are lost too often.
        """
        result, done = None, False
        for _ in range(_ROUNDS):
            lost = False
            if not done:
                try:
                    self.pool.again()
                    result = work()
                    done = True
                except NoServers:
                    lost = True
            if not self._anywhere(lost):
                break
            self._lost = True
            self.publish(self._export, self.version)
        else:
            raise ServersGone(
                f"all rollout servers were lost {_ROUNDS} times over the same requests; the logs of "
                "the ranks say of what (is lost: ...); see also rollout.request_timeout_s"
            )
        resent = self.pool.resent
        self.pool.forget()
        self._lost = self._anywhere(len(self.pool.clients) < len(self._members))
        return result, resent

    def _anywhere(self, flag: bool) -> bool:
        found = torch.tensor(float(flag), device=self.world.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def has_new_servers(self) -> bool:
        """Whether a server waits for weights: a new one, or one that was lost and came back."""
        waiting = self.world.is_rank0 and any(
            endpoint not in self._members for endpoint in registered(self.servers)
        )
        return self.world.broadcast_from_rank0(waiting)

    def verify(self, score: Callable[[Batch, float], ScoredBatch]) -> float | None:
        """Holds every server's log-probs of fixed sequences against `score`, Learner.score.

        Returns the mean |difference| in nats, None if all servers were lost meanwhile. Raises
        SyncMismatch where it is beyond what rounding explains: the servers then run other weights than
        the learner, or read them in another way.
        """
        task, count = self.task, _VERIFIED_SEQUENCES
        prompts = task.held_out_prompts(count) or task.all_training_prompts(count)
        sequences = [prompt.ids for prompt in prompts]
        batch = Batch.from_token_ids(sequences).to(self.world.device)
        learnt = score(batch, 1.0).pi_logprobs[batch.mask].tolist()
        found: list[float] = []
        if self.world.is_rank0:
            for client in list(self.pool.clients):
                try:
                    served = [lp for sequence in client.score(sequences) for lp in sequence]
                except ServerLost as error:
                    self.pool.lose(client, error)
                    continue
                apart = [abs(a - b) for a, b in zip(served, learnt, strict=True)]
                found.append(sum(apart) / len(apart))
        difference = self.world.broadcast_from_rank0(largest(found))
        if difference is None:
            return None
        dtypes = {self.recipe.precision.dtype, self.recipe.precision.served}
        limit = max(_ROUNDING[dtype] for dtype in dtypes)
        if not difference <= limit:
            raise SyncMismatch(
                f"after publishing version {self.version} the servers' log-probs differ from the "
                f"learner's by {difference:.3g} nats on average; rounding explains {limit:g}. The "
                "servers do not run the learner's weights: check sync.transport and the model family"
            )
        return difference

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        """One sample of each held-out prompt. Raises RewardError if too many cannot be graded."""
        if not prompts:
            return Evaluation(metrics={"eval/accuracy": None})
        samples: list[Sample] = []
        metrics: Metrics = {}
        asked = list(enumerate(prompts))
        first = self.world.is_rank0
        found, _ = self._survive(lambda: self._sample(asked, 1, "held out") if first else None)
        if found is not None:
            samples, tally = found
            metrics = self._account("eval", tally)
        accuracy = self.world.broadcast_from_rank0(sum(s.reward for s in samples) / len(prompts))
        return Evaluation(accuracy, samples, {"eval/accuracy": accuracy, **metrics})

    def evaluate_suites(self) -> dict[str, float]:
        """Metrics of the recipe's `trainer.suites`."""
        seed = self.recipe.trainer.seed if self.recipe.rollout.deterministic else None
        found, _ = self._survive(
            lambda: {
                k: v for suite in self.suites for k, v in suite.measure(self.pool, seed).items()
            }
        )
        return self.world.broadcast_from_rank0(found)

    def _sample(
        self,
        prompts: list[tuple[int, Prompt]],
        per_prompt: int,
        purpose: str,
        routing: Routing | None = None,
    ) -> tuple[list[Sample], Tally]:
        """`per_prompt` graded samples of each (group, prompt), in order, spread over the servers."""
        settings = self.recipe.rollout
        asked = [pair for pair in prompts for _ in range(per_prompt)]
        seeds = None
        if settings.deterministic:
            seeds = [
                random.Random(f"{self.recipe.trainer.seed}/{purpose}/{group}/{i}").getrandbits(62)
                for group, _ in prompts
                for i in range(per_prompt)
            ]
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, stop=tuple(settings.stop)
        )
        generations = self.pool.generate(
            [prompt.ids for _, prompt in asked], sampling, seeds, routing
        )
        return to_samples(self.task, asked, generations, self.version)

    def _of_all_replicas(self, value: object) -> list[object]:
        values = [value] * self.world.data.size
        if len(values) > 1:
            dist.all_gather_object(values, value, group=self.world.data.group)
        return values

    def _account(self, part: str, tally: Tally) -> Metrics:
        """Counts what could not be graded, shows it, and raises RewardError if it is too much."""
        if tally.errors and self.world.is_rank0:
            print(
                f"{part}: {tally.errors} of {tally.graded} responses could not be graded and earn 0; "
                f"the first error: {tally.first_error}",
                flush=True,
            )
        tally.check(self.task.max_error_fraction)
        return {f"{part}/timeouts": tally.timeouts, f"{part}/errors": tally.errors}


def largest(differences: Sequence[float]) -> float | None:
    """NaN if one of them is, which max() may pass over; None if there are none."""
    return max(differences, key=lambda apart: (math.isnan(apart), apart), default=None)


def to_samples(
    task: Task,
    asked: Sequence[tuple[int, Prompt]],
    generations: Sequence[Generation],
    version: int,
) -> tuple[list[Sample], Tally]:
    """Graded samples, and how their grading went.

    asked: group and prompt of each. Raises ServerError if other weights made one than those of
    `version`.
    """
    for generation in generations:
        if generation.version != str(version):
            raise ServerError(
                f"a server sampled from weights of version {generation.version!r}, "
                f"but version {version} was published"
            )
    # A truncated answer is no answer: it earns nothing, whatever it holds so far.
    whole = [i for i, generation in enumerate(generations) if not generation.truncated]
    texts = [
        templates.decode(prompt.ids, generation.ids, task.tokenizer)
        for (_, prompt), generation in zip(asked, generations, strict=True)
    ]
    grades = task.grades([asked[i][1] for i in whole], [texts[i] for i in whole])
    rewards = {i: grade.reward for i, grade in zip(whole, grades, strict=True)}
    samples = [
        Sample(
            prompt=prompt,
            group=group,
            ids=generation.ids,
            logprobs=generation.logprobs,
            text=texts[i],
            truncated=generation.truncated,
            version=version,
            reward=rewards.get(i, 0.0),
            experts=generation.experts,
        )
        for i, ((group, prompt), generation) in enumerate(zip(asked, generations, strict=True))
    ]
    return samples, Tally.of(grades)
