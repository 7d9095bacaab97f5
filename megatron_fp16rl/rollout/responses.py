"""Responses that weight updates cut: each token keeps the log-prob, version and experts that sampled it.

A server never changes its weights under a request: a request that runs is aborted, what it sampled so far
is kept, and the rest is requested from prompt and tokens under the new weights, with the same seed. (SGLang
0.5.23 hashes a seed with the position: under equal weights a response that was cut goes on as if it had
not been.)
"""

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch

from megatron_fp16rl.data.batch import Prompt, Sample
from megatron_fp16rl.data.rewards import GradingStats
from megatron_fp16rl.rollout.client import Client, Generation
from megatron_fp16rl.rollout.recording import decoded, encoded

Decode = Callable[[list[int]], str]
Graded = tuple[list[str], list[float], GradingStats]


@dataclass
class Response:
    """A response as far as it is sampled. The fields are those of Sample."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights that sampled each token
    experts: torch.Tensor | None = None
    truncated: bool = False
    is_done: bool = False
    draws: int = 0  # times that it was begun before, and dropped
    text: str = ""
    reward: float | None = None  # once it is graded
    # Of an environment: which of `ids` the model sampled, where its present turn begins, what was said in all
    # turns before, and the name of the sample there.
    mask: list[bool] = field(default_factory=list)
    turn: int = 0
    turns: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def is_older_than(self, version: int) -> bool:
        """Whether older weights sampled its first token; those of later tokens are never older."""
        return bool(self.versions) and self.versions[0] < version

    @property
    def is_cut(self) -> bool:
        """Whether several versions sampled it."""
        return bool(self.versions) and self.versions[0] != self.versions[-1]

    def add(
        self, piece: Generation, stop: Sequence[str] = (), decode: Decode = lambda ids: ""
    ) -> None:
        """Appends what a request for the rest returned. stop, decode: of a response that may be cut."""
        if piece.aborted:
            # Whether its last token ends the response was not looked at: it is sampled again.
            piece = first(piece, len(piece.ids) - 1)
        # A server looks for stop strings in its own tokens only: one that begins before them is found here,
        # and what follows it is dropped, as the server would.
        earlier = self.ids[self.turn :]
        end = straddling(earlier, piece.ids, stop, decode) if earlier else None
        if end is not None:
            piece = replace(first(piece, end), aborted=False, truncated=False)
        if piece.ids:
            if piece.experts is not None:
                # The request's prompt holds the earlier tokens: their experts stay those that sampled them.
                known = piece.experts[:0] if self.experts is None else self.experts
                self.experts = torch.cat([known, piece.experts[len(known) :]])
            self.ids = self.ids + piece.ids
            self.logprobs = self.logprobs + piece.logprobs
            # A server that nobody has sent weights, as in an evaluation, has no number for them.
            version = int(piece.version) if piece.version.isdigit() else -1
            self.versions = self.versions + [version] * len(piece.ids)
            self.mask = self.mask + [True] * len(piece.ids)
        self.is_done, self.truncated = not piece.aborted, piece.truncated

    def read(self, ids: list[int], text: str) -> None:
        """Appends what an environment said: the model goes on with its next turn."""
        self.said = [*self.said, text]
        self.ids, self.mask = self.ids + ids, self.mask + [False] * len(ids)
        self.logprobs = self.logprobs + [0.0] * len(ids)
        self.versions = self.versions + self.versions[-1:] * len(ids)
        self.turn, self.is_done = len(self.ids), False

    def sample(self, prompt: Prompt, group: int) -> Sample:
        """The response once it is done and graded."""
        assert self.reward is not None
        return Sample(
            prompt=prompt,
            group=group,
            ids=self.ids,
            logprobs=self.logprobs,
            text=self.text,
            truncated=self.truncated,
            version=self.versions,
            reward=self.reward,
            experts=self.experts,
            mask=None if all(self.mask) else self.mask,
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(replace(self, experts=None)), "experts": encoded(self.experts)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Response":
        sampled = {"mask": [True] * len(values["ids"])}  # earlier versions wrote none
        return cls(**{**sampled, **values, "experts": decoded(values["experts"])})


@dataclass
class Group:
    """A prompt's responses. step, index: its place in the order of the task's prompts."""

    step: int
    index: int
    responses: list[Response]
    attempt: int = 0  # of dynamic sampling: times that the prompt was replaced
    grading: "Future[Graded] | None" = None  # of those without a reward
    client: Client | None = None  # that samples them

    @property
    def is_done(self) -> bool:
        return all(response.is_done for response in self.responses)

    @property
    def ungraded(self) -> list[Response]:
        return [response for response in self.responses if response.reward is None]

    @property
    def oldest(self) -> int:
        """The version of the oldest token; of a group that is done."""
        return min(response.versions[0] for response in self.responses)

    def to_json(self) -> dict[str, Any]:
        responses = [response.to_json() for response in self.responses]
        place = {"step": self.step, "index": self.index, "attempt": self.attempt}
        return {**place, "responses": responses}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        responses = [Response.from_json(response) for response in values["responses"]]
        return cls(**{**values, "responses": responses})


def straddling(
    earlier: list[int], ids: list[int], stop: Sequence[str], decode: Decode
) -> int | None:
    """How many of `ids` a response has that ends with a stop string begun in `earlier`; None: no such."""
    # As SGLang 0.5.23 looks: in the text of as many last tokens as the longest stop string has letters.
    reach = max((len(text) for text in stop), default=0)
    for count in range(1, min(len(ids), reach) + 1):
        tail = decode((earlier + ids[:count])[-reach - 1 :])
        if any(text in tail for text in stop):
            return count
    return None


def first(piece: Generation, count: int) -> Generation:
    """Its first `count` tokens; none for a count below 0."""
    count = max(0, count)
    dropped, experts = len(piece.ids) - count, piece.experts
    return replace(
        piece,
        ids=piece.ids[:count],
        logprobs=piece.logprobs[:count],
        experts=experts if experts is None else experts[: len(experts) - dropped],
    )
