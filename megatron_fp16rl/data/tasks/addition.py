"""Sums of two numbers, e.g. `27+85=` -> `211`: the answer 112, least significant digit first.

Written in this order, each digit depends on what is to its left, as carries do: a model of two
layers can learn it.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.rewards import Grade
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.data.tasks.dataset import read_sums
from megatron_fp16rl.recipe import AdditionTask, RecipeError

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase


class Addition:
    """All pairs of numbers with at most `digits` digits; some unordered pairs are held out."""

    max_error_fraction = 0.0
    environment = None

    def __init__(
        self, settings: AdditionTask, tokenizer: "PreTrainedTokenizerBase", seed: int
    ) -> None:
        self.settings, self.tokenizer, self.seed = settings, tokenizer, seed
        if settings.problems is None:
            self.training, self.held_out = self._split()
        else:
            self.training = self.held_out = read_sums(Path(settings.problems))
        self.description = f"{len(self.training)} sums to train on, {len(self.held_out)} held out"

    def _split(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        settings, limit = self.settings, 10**self.settings.digits
        unordered = [(a, b) for a in range(limit) for b in range(a, limit)]
        random.Random(settings.seed).shuffle(unordered)
        count = max(1, round(len(unordered) * settings.held_out))
        held_out, training = (
            [pair for ab in part for pair in {ab, ab[::-1]}]
            for part in (unordered[:count], unordered[count:])
        )
        return training, held_out

    def training_prompts(self, step: int, count: int) -> list[Prompt]:
        """`count` different pairs. Raises RecipeError if there are not so many."""
        if count > len(self.training):
            raise RecipeError(
                f"a step asks for {count} different sums (rollout.prompts, as often again for each of "
                f"rollout.refill_rounds), but there are {len(self.training)} to train on"
            )
        chosen = random.Random(f"{self.seed}/{step}").sample(self.training, count)
        return [self._prompt(a, b) for a, b in chosen]

    def all_training_prompts(self, count: int) -> list[Prompt]:
        return [self._prompt(a, b) for a, b in self.training[:count]]

    def as_problem(self, prompt: Prompt) -> tuple[str, str]:
        return prompt.text, prompt.answer

    def held_out_prompts(self, count: int) -> list[Prompt]:
        """The same pairs whatever the run's seed."""
        pairs = random.Random(self.settings.seed).sample(
            self.held_out, min(count, len(self.held_out))
        )
        return [self._prompt(a, b) for a, b in pairs]

    def grades(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Grade]:
        return [
            Grade(float(response == prompt.answer))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _prompt(self, a: int, b: int) -> Prompt:
        digits = self.settings.digits
        text = f"{a:0{digits}}+{b:0{digits}}="
        answer = f"{a + b:0{digits + 1}}"[::-1]
        return Prompt(text, templates.encode("none", text, self.tokenizer), answer)
