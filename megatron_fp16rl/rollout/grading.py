"""Grades responses: used in training and in evaluation, so that both mean the same by a reward."""

from collections.abc import Sequence
from typing import Protocol

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.data.tasks import Task, templates


class Sampled(Protocol):
    """A response's tokens, and whether it was cut at max_new_tokens."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def truncated(self) -> bool: ...


def grade(
    task: Task, prompts: Sequence[Prompt], generations: Sequence[Sampled]
) -> tuple[list[str], list[float], GradingStats]:
    """The text and the reward of each response, and how grading went.

    A truncated response earns 0 without being graded, whatever it holds so far.
    """
    texts = [
        templates.decode(prompt.ids, generation.ids, task.tokenizer)
        for prompt, generation in zip(prompts, generations, strict=True)
    ]
    complete = [i for i, generation in enumerate(generations) if not generation.truncated]
    grades = task.grades([prompts[i] for i in complete], [texts[i] for i in complete])
    rewards = [0.0] * len(texts)
    for i, one in zip(complete, grades, strict=True):
        rewards[i] = one.reward
    return texts, rewards, GradingStats.of(grades)
