"""What the training loop asks of the rollout servers: collect a batch, publish weights, evaluate."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from megatron_fp16rl.batch import Batch, Prompt, Sample
from megatron_fp16rl.evaluation.online import Online
from megatron_fp16rl.learner.world import World
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rewards import Tally
from megatron_fp16rl.rollout.client import Client, Generation, Sampling, ServerError
from megatron_fp16rl.rollout.recording import write_samples
from megatron_fp16rl.rollout.refill import collect_with_signal
from megatron_fp16rl.rollout.server import read_endpoints
from megatron_fp16rl.tasks import Task
from megatron_fp16rl.weights import transport
from megatron_fp16rl.weights.families import Routing, load_config, routing

_VERIFIED_SEQUENCES = 8
# Mean |dlogp| between the engines seen on real and tiny models is 10 to 100 times below; wrong
# weights give more than 1.
_ROUNDING = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}


class SyncMismatch(RuntimeError):
    """The servers do not compute what the learner computes."""


class Rollouts:
    """The servers, as one learner rank sees them. Every method is collective over the world."""

    def __init__(
        self, recipe: Recipe, task: Task, world: World, endpoints: Path, like: Path, folder: Path
    ) -> None:
        """endpoints: the file that the launcher writes once all servers are healthy.

        folder: the run directory.
        """
        self.recipe, self.task, self.world = recipe, task, world
        self.version: int | None = None  # that the servers have
        self.counts: dict[str, int] = {}  # metrics of the last collection or evaluation
        self.record = folder / "rollouts" if recipe.rollout.record else None
        self.clients: list[Client] = []
        self.transport: transport.Transport | None = None
        settings = recipe.rollout
        self.routing = routing(load_config(like)) if settings.router_replay else None
        if world.is_leader:
            found = read_endpoints(endpoints, settings.start_timeout_s)
            self.clients = [Client(e, settings.request_timeout_s) for e in found]
            self._threads = ThreadPoolExecutor(len(found), "rollout")
        self.suites: list[Online] = []
        if world.is_first:
            self.suites = [Online.of(s, recipe, task.tokenizer) for s in recipe.trainer.suites]
            self.transport = transport.connect(
                recipe.sync,
                self.clients,
                settings.tensor_parallel,
                settings.host,
                like,
                folder / "scratch",
                recipe.precision.served,
            )

    def collect(self, step: int) -> Batch:
        """Samples this replica's share of a step's prompts.

        Raises RewardError on every rank if too many of all replicas' responses cannot be graded.
        """
        batch, tally, refilled = None, None, 0
        if self.world.is_leader:
            samples, tally, refilled = self._draw(step)
            if self.record is not None:
                write_samples(self.record, step, self.world.data.rank, samples)
            batch = Batch.from_samples(samples)
        batch, tally, refilled = self.world.from_leader((batch, tally, refilled))
        tallies, refills = zip(*self._of_all_replicas((tally, refilled)), strict=True)
        self._account("reward", sum(tallies, Tally()))
        self.counts["rollout/refilled_prompts"] = sum(refills)
        return batch.to(self.world.device)

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

    def publish(self, tensors: transport.Stream, version: int) -> int:
        """Puts weights into every server, under `version`. Returns the bytes sent.

        Every rank must call it, because gathering the weights takes all ranks.
        """
        sent = 0
        if self.transport is not None:
            sent = self.transport.send(tensors, str(version))
        else:
            for _ in tensors:
                pass
        self.version = version
        return self.world.from_first(sent)

    def verify(self, score: Callable[[Batch, float], Batch]) -> float:
        """Holds every server's log-probs of fixed sequences against `score`, Learner.score.

        Returns the mean |difference| in nats. Raises SyncMismatch where it is beyond what rounding
        explains: the servers then run other weights than the learner, or read them in another way.
        """
        sequences = [p.ids for p in self.task.held_out_prompts(_VERIFIED_SEQUENCES)]
        batch = Batch.from_token_ids(sequences).to(self.world.device)
        learnt = score(batch, 1.0).pi_logprobs[batch.mask].tolist()
        difference = 0.0
        if self.world.is_first:
            for client in self.clients:
                served = [lp for sequence in client.score(sequences) for lp in sequence]
                apart = [abs(a - b) for a, b in zip(served, learnt, strict=True)]
                difference = max(difference, sum(apart) / len(apart))
        difference = self.world.from_first(difference)
        dtypes = {self.recipe.precision.dtype, self.recipe.precision.served}
        limit = max(_ROUNDING[dtype] for dtype in dtypes)
        if not difference <= limit:
            raise SyncMismatch(
                f"after publishing version {self.version} the servers' log-probs differ from the "
                f"learner's by {difference:.3g} nats on average; rounding explains {limit:g}. The "
                "servers do not run the learner's weights: check sync.transport and the model family"
            )
        return difference

    def evaluate(self, prompts: list[Prompt]) -> tuple[float, list[Sample]]:
        """Mean reward of one sample of each held-out prompt; the samples are with rank 0 only."""
        samples: list[Sample] = []
        if self.world.is_first:
            samples, tally = self._sample(list(enumerate(prompts)), 1, "held out")
            self._account("eval", tally)
        mean = sum(s.reward for s in samples) / max(1, len(samples))
        return self.world.from_first(mean), samples

    def evaluate_suites(self) -> dict[str, float]:
        """Metrics of the recipe's `trainer.suites`."""
        seed = self.recipe.trainer.seed if self.recipe.rollout.deterministic else None
        found = {
            k: v for suite in self.suites for k, v in suite.measure(self.clients, seed).items()
        }
        return self.world.from_first(found)

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
        servers = len(self.clients)
        cuts = [round(i * len(asked) / servers) for i in range(servers + 1)]
        answers = self._threads.map(
            lambda i: self.clients[i].generate(
                [prompt.ids for _, prompt in asked[cuts[i] : cuts[i + 1]]],
                sampling,
                seeds and seeds[cuts[i] : cuts[i + 1]],
                routing,
            ),
            [i for i in range(servers) if cuts[i] < cuts[i + 1]],
        )
        generations = [generation for answer in answers for generation in answer]
        return to_samples(self.task, asked, generations, self.version)

    def _of_all_replicas(self, value: object) -> list[object]:
        values = [value] * self.world.data.size
        if len(values) > 1:
            dist.all_gather_object(values, value, group=self.world.data.group)
        return values

    def _account(self, part: str, tally: Tally) -> None:
        """Counts what could not be graded, shows it, and raises RewardError if it is too much."""
        self.counts = {f"{part}/timeouts": tally.timeouts, f"{part}/errors": tally.errors}
        if tally.errors and self.world.is_first:
            print(
                f"{part}: {tally.errors} of {tally.graded} responses could not be graded and earn 0; "
                f"the first error: {tally.first_error}",
                flush=True,
            )
        tally.check(self.task.max_error_fraction)


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
    grades = task.grades([asked[i][1] for i in whole], [generations[i].text for i in whole])
    rewards = {i: grade.reward for i, grade in zip(whole, grades, strict=True)}
    samples = [
        Sample(
            prompt=prompt,
            group=group,
            ids=generation.ids,
            logprobs=generation.logprobs,
            text=generation.text,
            truncated=generation.truncated,
            version=version,
            reward=rewards.get(i, 0.0),
            experts=generation.experts,
        )
        for i, ((group, prompt), generation) in enumerate(zip(asked, generations, strict=True))
    ]
    return samples, Tally.of(grades)
