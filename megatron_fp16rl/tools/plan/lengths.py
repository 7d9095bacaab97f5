"""How long a recipe's sequences can get, and what a learner rank runs at once because of it."""

import math
from dataclasses import dataclass

from megatron_fp16rl import platform
from megatron_fp16rl.data.micro_batches import padded_length
from megatron_fp16rl.recipe import AdditionTask, Recipe
from megatron_fp16rl.tools.plan.stage import MicroBatch

_UNKNOWN_PROMPT = 1024


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest prompt and response. is_assumed: nothing in the recipe bounds the prompt."""

    prompt: int
    response: int
    is_assumed: bool = False

    @property
    def sequence(self) -> int:
        return self.prompt + self.response


def longest(recipe: Recipe) -> Lengths:
    """The longest sequence that a recipe admits.

    Prompts are bounded by task.max_prompt_tokens, else by what the servers' context leaves, else
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


def length_multiple(recipe: Recipe) -> int:
    """Tokens of which a padded sequence is a multiple."""
    return recipe.learner.length_multiple(platform.current().PAD_TO_MULTIPLE_OF)


def micro_batch(recipe: Recipe) -> MicroBatch:
    """The largest micro-batch that Forward.micro_batches can make.

    Sequences that fill the budget, or one of the longest if that is more. Scoring cuts all of a
    rank's share of a step, an update maybe less.
    """
    learner, rollout, lengths = recipe.learner, recipe.rollout, longest(recipe)
    multiple = length_multiple(recipe)
    most = padded_length(lengths.sequence, multiple)
    sequences = rollout.prompts * rollout.samples // learner.data_parallel
    rows, seq = max(
        (
            (min(sequences, max(1, learner.micro_batch_tokens // seq)), seq)
            for seq in range(multiple, most + 1, multiple)
        ),
        key=lambda shape: (math.prod(shape), shape[1]),  # of equals the longest
    )
    return MicroBatch(rows, seq, rows * min(lengths.response, seq - 1))


def micro_batches(recipe: Recipe) -> int:
    """Micro-batches of one update on a data-parallel rank, of the longest sequences."""
    learner = recipe.learner
    sequences = learner.global_batch_size // learner.data_parallel
    most = padded_length(longest(recipe).sequence, length_multiple(recipe))
    rows = max(1, learner.micro_batch_tokens // most)
    count = -(-sequences // rows)
    if learner.model_chunks > 1:
        stages = learner.pipeline_parallel
        count = -(-count // stages) * stages
    return count
