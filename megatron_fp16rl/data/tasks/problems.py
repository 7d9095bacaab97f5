"""Tasks made of a list of problems: what is held out, in which order they come, how they are asked."""

import functools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.rewards import Grade, Grader, Row
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.data.tasks.split import parts_of
from megatron_fp16rl.recipe import Problems, RecipeError

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

    from megatron_fp16rl.data.environments import Environments


class ProblemTask:
    """Problems with their answers, in epochs.

    The problems of a step are those at positions step x count to (step + 1) x count in an endless
    row of epochs, each in an order drawn from the run's seed: a run that is resumed goes on where it
    stopped, and nothing but the step has to be saved for it. Steps below zero are before the first.
    """

    environment: "Environments | None" = None

    def __init__(
        self,
        settings: Problems,
        problems: list[tuple[str, str]],
        grade: Grader,
        max_error_fraction: float,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
    ) -> None:
        """problems: (problem, answer). seed: the run's. Raises RecipeError if none are left."""
        templates.check(settings, tokenizer)
        self.settings, self.problems = settings, problems
        self.tokenizer, self.seed = tokenizer, seed
        self.max_error_fraction = max_error_fraction
        self._grade = grade
        parts = parts_of(settings, problems)
        # Cut before long ones are left out: the split is the same for every tokenizer.
        self.held_out, self.training = self._short(parts.held_out), self._short(parts.training)
        count = len(parts.held_out) + len(parts.training)
        if not self.training or (parts.held_out and not self.held_out):
            raise RecipeError(
                f"task: of {count} problems none is left to train on or none to hold out: "
                f"see task.max_prompt_tokens={settings.max_prompt_tokens} and "
                f"task.held_out={settings.held_out}"
            )
        long = count - len(self.held_out) - len(self.training)
        left_out = {
            "repeats": parts.repeats,
            f"of over {settings.max_prompt_tokens} tokens": long,
            f"with several answers (as {next(iter(parts.at_odds), '')[:60]!r})": len(parts.at_odds),
        }
        self.description = (
            f"{len(self.training)} problems to train on, {len(self.held_out)} held out"
            + "".join(f", {count} {what} left out" for what, count in left_out.items() if count)
        )

    def training_prompts(self, step: int, count: int) -> list[Prompt]:
        size, prompts = len(self.training), []
        for position in range(step * count, (step + 1) * count):
            epoch, place = divmod(position, size)
            order = _epoch_order(size, f"{self.seed}/{epoch}")
            prompts.append(self._prompt(self.training[order[place]]))
        return prompts

    def all_training_prompts(self, count: int) -> list[Prompt]:
        return [self._prompt(index) for index in self.training[:count]]

    def as_problem(self, prompt: Prompt) -> tuple[str, str]:
        """The (problem, answer) that a prompt asks, as data has it."""
        return self.problems[prompt.index]

    def held_out_prompts(self, count: int) -> list[Prompt]:
        return [self._prompt(index) for index in self.held_out[:count]]

    def grades(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Grade]:
        return self._grade(
            [
                Row(prompt.text, response, prompt.answer, prompt.index)
                for prompt, response in zip(prompts, responses, strict=True)
            ]
        )

    def _prompt(self, index: int) -> Prompt:
        problem, answer = self.problems[index]
        text = templates.render(self.settings, problem, self.tokenizer)
        ids = templates.encode(self.settings.template, text, self.tokenizer)
        return Prompt(text, ids, answer, index=index)

    def _short(self, indices: list[int]) -> list[int]:
        limit = self.settings.max_prompt_tokens
        return [i for i in indices if limit is None or len(self._prompt(i).ids) <= limit]


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
