"""Samples and grades one data-parallel leader's prompts. HTTP only: nothing here is collective."""

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fp16rl.data.batch import Batch, Prompt, Sample
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.data.tasks import Task
from megatron_fp16rl.models.spec import Routing
from megatron_fp16rl.recipe import Rollout
from megatron_fp16rl.rollout import function
from megatron_fp16rl.rollout.client import Generation, Sampling, ServerError
from megatron_fp16rl.rollout.function import RolloutClient
from megatron_fp16rl.rollout.grading import grade
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.recording import write_samples
from megatron_fp16rl.rollout.turns import Turns, play

# samples of (group, prompt) pairs in an attempt, counted from 0
Draw = Callable[[list[tuple[int, Prompt]], int], list[Sample]]


@dataclass(frozen=True)
class Collected:
    """Samples in the order of their prompts, how their grading went, and counts to be logged."""

    samples: list[Sample]
    tally: GradingStats
    counts: dict[str, int] = field(default_factory=dict)


class Collector:
    """Collects the share of the prompts that falls to data-parallel rank `rank` of `size`.

    Each method may raise NoServers; called again after a publish, it requests only what is missing.
    """

    def __init__(
        self,
        settings: Rollout,
        task: Task,
        pool: Pool,
        seed: int,
        rank: int = 0,
        size: int = 1,
        routing: Routing | None = None,
        record: Path | None = None,
    ) -> None:
        """routing: of the model, for router replay. record: a folder in which every sample is kept."""
        self.settings, self.task, self.pool, self.seed = settings, task, pool, seed
        self.rank, self.size, self.routing, self.record = rank, size, routing, record

    @property
    def sampling(self) -> Sampling:
        """How training responses and held-out ones are drawn."""
        settings = self.settings
        return Sampling(settings.max_new_tokens, settings.temperature, stop=tuple(settings.stop))

    def sampling_seed(self, purpose: str, group: int, sample: int) -> int:
        """Of one response, whoever samples it, and with whatever else."""
        return random.Random(f"{self.seed}/{purpose}/{group}/{sample}").getrandbits(62)

    def collect(self, step: int, versions: Collection[int]) -> Collected:
        """Samples of this rank's prompts of a step, each from weights of one of `versions`."""
        count, share = self.settings.prompts, self.settings.prompts // self.size
        attempts = 1 + self.settings.refill_rounds
        prompts = self.task.training_prompts(step, count * attempts)
        tally = GradingStats()

        def draw(pairs: list[tuple[int, Prompt]], attempt: int) -> list[Sample]:
            nonlocal tally
            purpose = purpose_of(step, attempt)
            drawn = self._sample(pairs, self.settings.samples, purpose, versions, self.routing)
            tally += drawn.tally
            return drawn.samples

        samples, replaced = dynamic_sampling(
            [prompts[i * count : (i + 1) * count] for i in range(attempts)],
            range(self.rank * share, (self.rank + 1) * share),
            draw,
        )
        if self.record is not None:
            write_samples(self.record, step, self.rank, samples)
        return Collected(samples, tally, {"rollout/refilled_prompts": replaced})

    def held_out(self, prompts: list[Prompt], versions: Collection[int]) -> Collected:
        """One sample of each prompt."""
        if self.task.environment is not None:
            return self._played(prompts, versions)
        return self._sample(list(enumerate(prompts)), 1, "held out", versions)

    def rescore(self, batch: Batch) -> Batch:
        """The same sequences with log-probs (at temperature 1) and experts of the servers' present weights."""
        sequences = [
            row[:length] for row, length in zip(batch.tokens.tolist(), batch.lengths, strict=True)
        ]
        starts = batch.mask.int().argmax(1).tolist()
        samples = [
            Sample(
                prompt=Prompt("", ids[:start], ""),
                group=group,
                ids=ids[start:],
                logprobs=logprobs[start - 1 :],
                text="",
                truncated=False,
                version=0,
                reward=0.0,
                experts=experts,
                mask=batch.mask[group, start : len(ids)].tolist(),
            )
            for group, (ids, start, (logprobs, experts)) in enumerate(
                zip(sequences, starts, self.pool.score(sequences, self.routing), strict=True)
            )
        ]
        return Batch.from_samples(samples)

    def _sample(
        self,
        prompts: list[tuple[int, Prompt]],
        per_prompt: int,
        purpose: str,
        versions: Collection[int],
        routing: Routing | None = None,
    ) -> Collected:
        """`per_prompt` graded samples of each (group, prompt), in order, spread over the servers."""
        settings = self.settings
        pairs = [pair for pair in prompts for _ in range(per_prompt)]
        if settings.function is not None:
            return self._by_function(settings.function, pairs, purpose, versions, routing)
        seeds = None
        if settings.deterministic:  # samples then depend on seed, step and prompt alone
            seeds = [
                self.sampling_seed(purpose, group, i)
                for group, _ in prompts
                for i in range(per_prompt)
            ]
        generations = self.pool.generate(
            [prompt.ids for _, prompt in pairs],
            self.sampling,
            seeds,
            routing,
        )
        return to_samples(self.task, pairs, generations, versions)

    def _by_function(
        self,
        name: str,
        pairs: list[tuple[int, Prompt]],
        purpose: str,
        versions: Collection[int],
        routing: Routing | None,
    ) -> Collected:
        """As `_sample`, by the user's own function."""

        def seed(call: int, i: int) -> int:
            return self.sampling_seed(f"{purpose} call {call} prompt {i}", self.rank, 0)

        fixed = seed if self.settings.deterministic else None
        client = RolloutClient(self.pool, self.task.tokenizer, self.sampling, routing, fixed)
        prompts = [prompt for _, prompt in pairs]
        responses = function.find(name)(client, prompts)
        most = self.settings.max_new_tokens
        function.check(name, responses, prompts, versions, most, routing is not None)
        # Where the function itself ended a turn, its response is not cut.
        for response in responses:
            response.truncated &= len(response.ids) == most
        own = [i for i, response in enumerate(responses) if response.reward is None]
        texts, rewards, tally = grade(
            self.task, [prompts[i] for i in own], [responses[i] for i in own]
        )
        for i, text, reward in zip(own, texts, rewards, strict=True):
            responses[i].text, responses[i].reward = text, reward
        drawn = zip(responses, pairs, strict=True)
        return Collected([r.sample(prompt, group) for r, (group, prompt) in drawn], tally)

    def _played(self, prompts: list[Prompt], versions: Collection[int]) -> Collected:
        seeds = None
        if self.settings.deterministic:
            seeds = [self.sampling_seed("held out", group, 0) for group in range(len(prompts))]
        turns = Turns(self.task, self.settings.max_new_tokens)
        responses, tally = play(turns, self.pool, prompts, self.sampling, seeds)
        for response in responses:
            for version in set(response.versions):
                check_version(version, versions)
        drawn = enumerate(zip(responses, prompts, strict=True))
        samples = [response.sample(prompt, group) for group, (response, prompt) in drawn]
        return Collected(samples, tally)


def purpose_of(step: int, attempt: int) -> str:
    """What a step's prompts are sampled for, in an attempt of dynamic sampling."""
    return f"step {step} attempt {attempt}"


def check_version(sampled: str | int, versions: Collection[int]) -> None:
    """Raises ServerError if other weights sampled a response than those of `versions`."""
    published = {str(version) for version in versions}
    if str(sampled) not in published:
        raise ServerError(
            f"a server sampled from weights of version {sampled!r}, "
            f"but version {' or '.join(sorted(published))} was published"
        )


def to_samples(
    task: Task,
    pairs: Sequence[tuple[int, Prompt]],
    generations: Sequence[Generation],
    versions: Collection[int],
) -> Collected:
    """Graded samples of (group, prompt) pairs.

    Raises ServerError if other weights sampled a response than those of `versions`.
    """
    for generation in generations:
        check_version(generation.version, versions)
    texts, rewards, tally = grade(task, [prompt for _, prompt in pairs], generations)
    samples = [
        Sample(
            prompt=prompt,
            group=group,
            ids=generation.ids,
            logprobs=generation.logprobs,
            text=text,
            truncated=generation.truncated,
            version=int(generation.version),
            reward=reward,
            experts=generation.experts,
        )
        for (group, prompt), generation, text, reward in zip(
            pairs, generations, texts, rewards, strict=True
        )
    ]
    return Collected(samples, tally)


def dynamic_sampling(
    attempts: list[list[Prompt]], groups: Iterable[int], draw: Draw
) -> tuple[list[Sample], int]:
    """Samples of each group, in order, and how many prompts were replaced.

    A group whose rewards have no variance teaches nothing: it is drawn again from its prompt in the
    next attempt. The last attempt stands. attempts: for each, the prompts of all groups of the step,
    so a replacement depends neither on other groups or steps nor on the number of ranks.
    Source: DAPO, arXiv 2503.14476, equation 11 and section 3.2.
    """
    groups = list(groups)
    kept: dict[int, list[Sample]] = {}
    open_groups, replaced = groups, 0
    for attempt, prompts in enumerate(attempts):
        samples = draw([(group, prompts[group]) for group in open_groups], attempt)
        for group in open_groups:
            kept[group] = [sample for sample in samples if sample.group == group]
        replaced += len(open_groups) if attempt else 0
        open_groups = [g for g in open_groups if len({sample.reward for sample in kept[g]}) == 1]
        if not open_groups:
            break
    return [sample for group in groups for sample in kept[group]], replaced
