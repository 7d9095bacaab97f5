"""Sums of two numbers, e.g. `27+85=` -> `211`: the answer 112, least significant digit first.

Written in this order, each digit depends on what is to its left, as carries do: a model of two
layers can learn it.
"""

import random
from collections.abc import Sequence

from megatron_fp16rl.batch import Prompt
from megatron_fp16rl.recipe import AdditionTask
from megatron_fp16rl.rewards import Grade


class Addition:
    """All pairs of numbers with at most `digits` digits; some unordered pairs are held out."""

    max_error_fraction = 0.0

    def __init__(self, settings: AdditionTask, tokenizer: object, seed: int) -> None:
        self.settings, self.tokenizer, self.seed = settings, tokenizer, seed
        limit = 10**settings.digits
        unordered = [(a, b) for a in range(limit) for b in range(a, limit)]
        random.Random(settings.seed).shuffle(unordered)
        count = max(1, round(len(unordered) * settings.held_out))
        self.held_out = [pair for ab in unordered[:count] for pair in {ab, ab[::-1]}]
        self.training = [pair for ab in unordered[count:] for pair in {ab, ab[::-1]}]
        self.description = f"{len(self.training)} sums to train on, {len(self.held_out)} held out"

    def training_prompts(self, step: int, count: int) -> list[Prompt]:
        """`count` different pairs."""
        chosen = random.Random(f"{self.seed}/{step}").sample(self.training, count)
        return [self._prompt(a, b) for a, b in chosen]

    def held_out_prompts(self, count: int) -> list[Prompt]:
        """The same pairs whatever the run's seed."""
        pairs = random.Random(self.settings.seed).sample(
            self.held_out, min(count, len(self.held_out))
        )
        return [self._prompt(a, b) for a, b in pairs]

    def grades(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Grade]:
        """1 for exactly the answer, else 0."""
        return [
            Grade(float(response == prompt.answer))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _prompt(self, a: int, b: int) -> Prompt:
        digits = self.settings.digits
        text = f"{a:0{digits}}+{b:0{digits}}="
        answer = f"{a + b:0{digits + 1}}"[::-1]
        return Prompt(text, self.tokenizer.encode(text, add_special_tokens=False), answer)
