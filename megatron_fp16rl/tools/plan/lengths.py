"""How long a recipe's sequences can get, the micro-batches that follow from it, and how much of these is padding."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from megatron_fp16rl import platform
from megatron_fp16rl.data import micro_batches as micro_batching
from megatron_fp16rl.recipe import AdditionTask, Recipe
from megatron_fp16rl.recipe.learner import Padding

_UNKNOWN_PROMPT = 1024
_SEQUENCES = 4096  # drawn to know their padding, in as many updates as they make
# Of the logarithms of responses' lengths, the standard deviation. Assumed: without a limit, a running response
# then has 0.75 of a mean one in the cache, as times.CACHED_SHARE says.
_SIGMA = 0.64


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest prompt and response. is_assumed: nothing in the recipe bounds the prompt."""

    prompt: int
    response: int
    is_assumed: bool = False

    @property
    def sequence(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class MicroBatch:
    """What a rank runs at once: `rows` of `seq` tokens each; `response` tokens of all of them have a log-prob."""

    rows: int
    seq: int
    response: int


def longest(recipe: Recipe) -> Lengths:
    """The longest sequence that a recipe admits.

    task.max_prompt_tokens bounds prompts, else the servers' context less the response does, else
    1,024 tokens are assumed.
    """
    response = recipe.rollout.max_new_tokens
    task = recipe.task
    if isinstance(task, AdditionTask):
        return Lengths(2 * task.digits + 2, response)
    if task.max_prompt_tokens is not None:
        return Lengths(task.max_prompt_tokens, response)
    context = recipe.rollout.sglang.get("context_length")
    if context is not None:
        return Lengths(max(1, int(context) - response), response)
    return Lengths(_UNKNOWN_PROMPT, response, is_assumed=True)


def padding(recipe: Recipe) -> Padding:
    """What tokens are padded to."""
    return recipe.learner.padding(platform.current().PAD_TO_MULTIPLE_OF)


def largest_micro_batch(recipe: Recipe) -> MicroBatch:
    """The largest micro-batch that the learner can make: it fills the budget, or is one long sequence.

    Scoring splits a rank's whole share of a step, so the share of one update does not bound the rows.
    """
    learner, rollout, lengths = recipe.learner, recipe.rollout, longest(recipe)
    multiple, ranks = padding(recipe).row, learner.context_parallel
    most = micro_batching.padded_length(lengths.sequence, multiple)
    sequences, budget = (
        rollout.prompts * rollout.samples // learner.data_parallel,
        learner.micro_batch_tokens * ranks,
    )
    if learner.packing:
        # Prompts are as long as they can be in all sequences but one, of which only a part has room.
        tokens = micro_batching.padded_length(
            max(lengths.sequence, min(budget, sequences * lengths.sequence)), multiple
        )
        whole, rest = divmod(tokens, lengths.sequence)
        response = min(whole * lengths.response + min(rest, lengths.response), tokens)
        return MicroBatch(1, tokens // ranks, -(-response // ranks))
    rows, seq = max(
        (
            (min(sequences, max(1, budget // seq)), seq)
            for seq in range(multiple, most + 1, multiple)
        ),
        key=lambda shape: (math.prod(shape), shape[1]),  # of equal sizes the longest sequences
    )
    response = rows * min(lengths.response, seq - 1)
    return MicroBatch(rows, seq // ranks, -(-response // ranks))


def micro_batches(recipe: Recipe) -> int:
    """Micro-batches of one update on a data-parallel rank, if all sequences have the longest length."""
    learner = recipe.learner
    sequences = learner.global_batch_size // learner.data_parallel
    to = padding(recipe)
    most = micro_batching.padded_length(
        longest(recipe).sequence, to.sequence if learner.packing else to.row
    )
    budget = learner.micro_batch_tokens * learner.context_parallel
    count = -(-sequences // max(1, budget // most))
    if learner.model_chunks > 1:  # the interleaved schedule needs a multiple of the stages
        count = -(-count // learner.pipeline_parallel) * learner.pipeline_parallel
    return count


def drawn_lengths(mean: float, most: int, source: random.Random) -> Callable[[], int]:
    """Draws log-normal lengths, cut at `most`, whose mean after the cut is `mean`; all `most` if it is that."""
    if mean >= most:
        return lambda: most
    normal, low, high = NormalDist(), 0.0, math.log(most) + 10 * _SIGMA
    for _ in range(60):
        mu = (low + high) / 2
        limit = (math.log(most) - mu) / _SIGMA
        uncut = math.exp(mu + _SIGMA**2 / 2) * normal.cdf(limit - _SIGMA)
        low, high = (mu, high) if uncut + most * normal.cdf(-limit) < mean else (low, mu)
    return lambda: min(most, max(1, round(source.lognormvariate(low, _SIGMA))))


@dataclass(frozen=True)
class Waste:
    """The share of the tokens that a learner runs which is padding, and in how many shapes it runs them."""

    share: float
    shapes: int


@dataclass(frozen=True)
class Packing:
    """The same sequences, packed and in rows."""

    packed: Waste
    rows: Waste


def packing(recipe: Recipe, prompt: float, mean: float, most: int) -> Packing:
    """Of one rank's updates. prompt: tokens of each. mean, most: of the responses, see drawn_lengths."""
    learner = recipe.learner
    draw = drawn_lengths(mean, most, random.Random(0))
    size = learner.global_batch_size // learner.data_parallel
    updates = [
        [round(prompt) + draw() for _ in range(size)] for _ in range(max(1, _SEQUENCES // size))
    ]
    to, budget = padding(recipe), learner.micro_batch_tokens * learner.context_parallel
    one_shape = learner.model_chunks > 1
    packed, rows = [], []
    for lengths in updates:
        groups = micro_batching.group_to_fill(lengths, budget, to.sequence)
        packed += micro_batching.in_packs(groups, lengths, to, one_shape)
        groups = micro_batching.group_by_length(lengths, budget, to.row, one_shape)
        rows += micro_batching.in_rows(groups, lengths, to, one_shape)
    return Packing(_waste(packed), _waste(rows))


def _waste(made: list[micro_batching.MicroBatch]) -> Waste:
    run, real = sum(m.tokens for m in made), sum(sum(m.lengths) for m in made)
    return Waste(1 - real / run, len({m.shape for m in made}))
