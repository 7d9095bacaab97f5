"""Rollouts of the user's own: `rollout.function: my_rollout.py:rollout`, called in each data-parallel leader.

    def rollout(client: RolloutClient, prompts: list[Prompt]) -> list[Response]: ...

One response to each prompt, in order. A response without a reward is graded by the task. Tokens that no
server sampled are added with `Response.read`: they are not learnt.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.models.spec import Routing
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.rollout.client import Generation, Sampling
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.responses import Response
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.user_code import load_function

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

Function = Callable[["RolloutClient", list[Prompt]], list[Response]]


class RolloutError(FinalError):
    """What a user's function returned cannot be learnt from. The message says which sample, and why."""


@dataclass
class RolloutClient:
    """What a function samples with.

    sampling   of the recipe; temperature and stop strings hold for all that is learnt
    seed       of the n-th call's i-th prompt; None: servers choose
    """

    pool: Pool
    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling
    routing: Routing | None
    seed: Callable[[int, int], int] | None = None
    calls: int = 0

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int | Sequence[int]
    ) -> list[Generation]:
        """Samples one continuation of each prompt (token ids), all at once. A stop string is kept.

        max_new_tokens: of all, or one for each. Raises NoServers, which is not to be caught: the function
        is called again when there are servers, and gets the answers that it had.
        """
        limits = max_new_tokens
        if isinstance(limits, int):
            limits = [limits] * len(prompts)
        sampling = self.sampling
        samplings = [
            Sampling(limit, sampling.temperature, sampling.top_p, sampling.stop) for limit in limits
        ]
        seeds = None
        if self.seed is not None:
            seeds = [self.seed(self.calls, i) for i in range(len(prompts))]
        self.calls += 1
        return self.pool.generate(prompts, samplings, seeds, self.routing)


@functools.cache  # the file is run once: what it holds lasts from step to step
def find(name: str) -> Function:
    """The function that a recipe names. Raises RecipeError."""
    try:
        return load_function(name, "client", "prompts")
    except Exception as error:  # the user's file may raise anything when it is imported
        raise RecipeError(f"rollout.function={name}: {type(error).__name__}: {error}") from error


def check(
    name: str,
    responses: Sequence[Response],
    prompts: Sequence[Prompt],
    versions: Collection[int],
    most: int,
    has_experts: bool,
) -> None:
    """Raises RolloutError if a sample cannot be learnt from.

    name: of the function. versions: of the servers' weights. most: tokens that may follow a prompt.
    """
    if not isinstance(responses, list | tuple) or len(responses) != len(prompts):
        what = len(responses) if isinstance(responses, list | tuple) else type(responses).__name__
        raise RolloutError(
            f"rollout.function={name} must return a list of one Response for each of the {len(prompts)} "
            f"prompts, in order, not {what}"
        )
    for i, (response, prompt) in enumerate(zip(responses, prompts, strict=True)):
        fault = _fault(response, prompt, versions, most, has_experts)
        if fault is not None:
            raise RolloutError(f"rollout.function={name}: sample {i}: {fault}")


def _fault(
    response: Response,
    prompt: Prompt,
    versions: Collection[int],
    most: int,
    has_experts: bool,
) -> str | None:
    """What is wrong with a sample."""
    if not isinstance(response, Response):
        return f"it is no Response but a {type(response).__name__}"
    ids, count = response.ids, len(response.ids)
    for key in ("logprobs", "versions", "mask"):
        if len(getattr(response, key)) != count:
            return (
                f"{len(getattr(response, key))} {key} of {count} tokens; see Response.add and read"
            )
    if not any(response.mask):
        return "no token of it was sampled by a server: there is nothing to learn"
    if count > most:
        return f"{count} tokens follow the prompt, over rollout.max_new_tokens={most}"
    sampled = [i for i in range(count) if response.mask[i]]
    for i in sampled:
        logprob = response.logprobs[i]
        if not (math.isfinite(logprob) and logprob <= 0):
            return f"token {i} has log-prob {logprob}; it is log mu, in nats, as Generation has it"
        if response.versions[i] not in versions:
            return (
                f"token {i} is of version {response.versions[i]}, but the servers have "
                f"{' or '.join(map(str, sorted(versions)))}"
            )
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        return "its ids are not all token ids"
    if has_experts and (
        response.experts is None or len(response.experts) != len(prompt.ids) + count - 1
    ):
        known = None if response.experts is None else len(response.experts)
        return (
            f"experts of {known} tokens, not of all {len(prompt.ids) + count - 1} but the last; end a "
            "response with what a server sampled, or set rollout.router_replay: false"
        )
    if response.reward is not None and not math.isfinite(response.reward):
        return f"its reward is {response.reward}"
    return None
