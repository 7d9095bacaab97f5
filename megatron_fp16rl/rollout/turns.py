"""The turns of samples that an environment plays. Token in, token out: no turn is tokenised again.

The model's tokens stay as they were sampled; what the environment says is appended as tokens that are not
learnt, and the next turn is requested from all of them.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.environments import Reply, Transcript
from megatron_fp16rl.data.rewards import Grade, GradingStats
from megatron_fp16rl.data.tasks import Task, templates
from megatron_fp16rl.recipe import EnvironmentTask
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.responses import Response


class Turns:
    """Of one task with an environment."""

    def __init__(self, task: Task, max_new_tokens: int) -> None:
        """max_new_tokens: of a sample, all that follows its prompt: what the environment says as well."""
        assert task.environment is not None
        self.task, self.environment = task, task.environment
        self.settings: EnvironmentTask = task.environment.settings
        self.max_new_tokens = max_new_tokens

    def step(self, response: Response, prompt: Prompt) -> "Future[Reply]":
        """Shows the environment a turn that is over."""
        before, turn = prompt.ids + response.ids[: response.turn], response.ids[response.turn :]
        text = templates.decode(before, turn, self.task.tokenizer)
        turns = [*response.turns[: len(response.said)], text]
        response.turns = turns
        problem, answer = self.task.as_problem(prompt)
        return self.environment.step(
            Transcript(problem, answer, turns, response.said, response.name)
        )

    def take(self, response: Response, prompt: Prompt, reply: Reply) -> Grade | None:
        """Goes on with a response after `step`, or ends it; returns how it was graded at its end.

        A sample without room for another turn is truncated, and earns 0 as any truncated response.
        """
        if reply.grade is None:
            ids = self.tokens(reply.text, response.ids[-1])
            if len(response.ids) + len(ids) < self.max_new_tokens:
                response.read(ids, reply.text)
                return None
            response.truncated = True
        self.end(response, prompt, 0.0 if reply.grade is None else reply.grade.reward)
        return reply.grade

    async def go_on(self, responses: Sequence[Response], prompt: Prompt) -> GradingStats:
        """Shows the environment the turns that are over, all at once; returns how samples were graded."""
        over = [response for response in responses if response.is_done and response.reward is None]
        for response in over:
            if response.truncated:
                self.end(response, prompt, 0.0)
        over = [response for response in over if response.reward is None]
        asked = [asyncio.wrap_future(self.step(response, prompt)) for response in over]
        replies = await asyncio.gather(*asked)
        pairs = zip(over, replies, strict=True)
        grades = [self.take(response, prompt, reply) for response, reply in pairs]
        return GradingStats.of([grade for grade in grades if grade is not None])

    def end(self, response: Response, prompt: Prompt, reward: float) -> None:
        """Grades a response that is over."""
        response.text = templates.decode(prompt.ids, response.ids, self.task.tokenizer)
        response.reward = reward

    def decode(self, ids: list[int]) -> str:
        return str(self.task.tokenizer.decode(ids))

    def tokens(self, text: str, last: int) -> list[int]:
        """What an environment says, as the model reads it. last: the last token of its turn."""
        tokenizer = self.task.tokenizer
        text = templates.reply(self.settings, text, last == tokenizer.eos_token_id, tokenizer)
        return list(tokenizer.encode(text, add_special_tokens=False))


def play(
    turns: Turns,
    client: Client | Pool,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: list[int] | None,
) -> tuple[list[Response], GradingStats]:
    """Samples of prompts, played to their ends and graded, in order: for evaluation, turn by turn.

    Raises ServerError, and NoServers; called again then, it requests only what is missing.
    """
    responses, grades = [Response() for _ in prompts], list[Grade]()
    while begun := [i for i, response in enumerate(responses) if response.reward is None]:
        pieces = client.generate(
            [prompts[i].ids + responses[i].ids for i in begun],
            [
                replace(sampling, max_new_tokens=sampling.max_new_tokens - len(responses[i].ids))
                for i in begun
            ],
            seeds and [seeds[i] for i in begun],
        )
        asked: list[tuple[int, Future[Reply]]] = []
        for i, piece in zip(begun, pieces, strict=True):
            responses[i].add(piece, sampling.stop, turns.decode)
            if piece.truncated:
                turns.end(responses[i], prompts[i], 0.0)
            else:
                asked.append((i, turns.step(responses[i], prompts[i])))
        for i, future in asked:
            grade = turns.take(responses[i], prompts[i], future.result())
            grades += [] if grade is None else [grade]
    return responses, GradingStats.of(grades)
