"""Tasks: prompts to train on, prompts held out, and what an answer is worth."""

from typing import Protocol

from megatron_fp16rl.batch import Prompt
from megatron_fp16rl.recipe import AdditionTask, MathTask


class Task(Protocol):
    """What the loop needs of a task. Prompts depend on the recipe and the step alone."""

    def training_prompts(self, step: int, count: int) -> list[Prompt]:
        """The prompts of a step."""

    def held_out_prompts(self, count: int) -> list[Prompt]:
        """At most `count` prompts that are never trained on, always the same."""

    def reward(self, prompt: Prompt, response: str) -> float:
        """What a response is worth, in [0, 1]. `response` has no special tokens."""


def make(settings: AdditionTask | MathTask, tokenizer: object, seed: int) -> Task:
    """The task of a recipe. seed: the run's; the split of a data set has a seed of its own."""
    if isinstance(settings, AdditionTask):
        from megatron_fp16rl.tasks.addition import Addition

        return Addition(settings, tokenizer, seed)
    from megatron_fp16rl.tasks.math import Math

    return Math(settings, tokenizer, seed)
