"""Prompts, samples, and batches of tensors: one type for each stage of the loop that adds to them.

Prompt -> Sample -> Batch (rollout) -> ScoredBatch (learner's log-probs) -> TrainBatch (advantages)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Prompt:
    """A problem as the server gets it, and its right answer."""

    text: str
    ids: list[int]  # tokens
    answer: str
    index: int = -1  # of the problem in its data set


@dataclass(frozen=True)
class Sample:
    """One graded response."""

    prompt: Prompt
    group: int  # samples of one prompt share it
    ids: list[int]  # response tokens, the end-of-sequence token included
    logprobs: list[float]  # of those tokens under mu, at the sampling temperature, nats
    text: str
    truncated: bool  # ran into max_new_tokens
    version: int | list[int]  # of the weights that sampled it: all of it, or each token
    reward: float
    experts: torch.Tensor | None = None  # [tokens - 1, layers, top_k], see Batch
    # of `ids`, those that the model sampled: False where an environment wrote; None: all
    mask: list[bool] | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences as the servers sampled them, right-padded.

    Entry t of a [batch, seq] tensor belongs to token t; its log-prob is that of the token given all tokens
    before it. Outside `mask` log-probs and advantages are zero. `ScoredBatch` and `TrainBatch` have what
    later stages add. Batches are never changed in place.
    """

    tokens: torch.Tensor  # [batch, seq] int64
    lengths: torch.Tensor  # [batch] int64, prompt and response
    # [batch, seq] bool, true at response tokens: those that the model sampled. What an environment wrote among
    # them is no response token.
    mask: torch.Tensor
    mu_logprobs: torch.Tensor  # [batch, seq] fp32, nats: under the rollout policy mu
    rewards: torch.Tensor  # [batch] fp32
    groups: torch.Tensor  # [batch] int64, the same for all samples of a prompt
    truncated: torch.Tensor  # [batch] bool
    versions: torch.Tensor  # [batch, seq] int32: of the weights that sampled each response token
    # [batch, seq, layers, top_k] from `compact`: the experts to which the server routed each token, for
    # router replay; `no_expert` at padding, the last token, and layers without experts. Many times larger
    # than all the rest: it stays on the host, and a learner rank holds its own layers alone.
    experts: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def replace(self, **tensors: Any) -> Self:
        """A copy with some tensors replaced; only `experts` may become None."""
        return replace(self, **tensors)

    def scored(
        self, pi_logprobs: torch.Tensor | None, reference_logprobs: torch.Tensor | None = None
    ) -> "ScoredBatch":
        """The same sequences with the learner's log-probs [batch, seq]; None where nobody needs them."""
        rollout = {field.name: getattr(self, field.name) for field in fields(Batch)}
        return ScoredBatch(
            **rollout, pi_logprobs=pi_logprobs, reference_logprobs=reference_logprobs
        )

    def to(self, device: torch.device) -> Self:
        """A copy on another device; records of experts stay where they are."""
        return self._each(lambda name, value: value if name == "experts" else value.to(device))

    def rows(self, index: torch.Tensor | Sequence[int], seq: int | None = None) -> Self:
        """The sequences at `index` [n], cut to `seq` tokens; default: the length of the longest of them."""
        index = torch.as_tensor(index)
        if seq is None:
            seq = int(self.lengths[index.to(self.lengths.device)].max())

        # `experts` may be on another device than the rest.
        index_on = {
            torch.device("cpu"): index.cpu(),
            self.tokens.device: index.to(self.tokens.device),
        }

        def pick(_: str, value: torch.Tensor) -> torch.Tensor:
            rows = index_on[value.device]
            return value[rows, :seq] if value.dim() > 1 else value[rows]

        return self._each(pick)

    def padded(self, rows: int, seq: int) -> Self:
        """Pads to [rows, seq]; added rows have no response tokens."""

        def widen(name: str, value: torch.Tensor) -> torch.Tensor:
            shape = (rows, seq, *value.shape[2:])[: value.dim()]
            if value.shape == shape:
                return value
            wide = value.new_full(shape, no_expert(value.dtype) if name == "experts" else 0)
            wide[tuple(slice(size) for size in value.shape)] = value
            return wide

        return self._each(widen)

    @classmethod
    def joined(cls, batches: Sequence[Self]) -> Self:
        """The sequences of several batches, without experts and without rows that are padding alone."""
        seq = max(batch.tokens.shape[1] for batch in batches)
        parts = [
            batch.replace(experts=None).rows(batch.mask.any(1).nonzero().flatten(), seq)
            for batch in batches
        ]
        tensors = [part.padded(len(part), seq).tensors() for part in parts]
        return cls(**{name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})

    def _each(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Self:
        tensors = self.tensors().items()
        return replace(self, **{name: change(name, tensor) for name, tensor in tensors})

    def tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_token_ids(cls, sequences: list[list[int]]) -> "Batch":
        """Sequences to score: every token but the first counts as a response token."""
        samples = []
        for group, (first, *rest) in enumerate(sequences):
            prompt, zeros = Prompt("", [first], ""), [0.0] * len(rest)
            samples.append(Sample(prompt, group, rest, zeros, "", False, 0, 0.0))
        return cls.from_samples(samples)

    @classmethod
    def from_samples(cls, samples: list[Sample]) -> "Batch":
        """Pads samples into a batch, in their order."""
        lengths = torch.tensor([len(s.prompt.ids) + len(s.ids) for s in samples])
        shape = (len(samples), int(lengths.max()))
        tokens = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        logprobs = torch.zeros(shape)
        versions = torch.zeros(shape, dtype=torch.int32)
        experts = None
        if samples[0].experts is not None:
            choices, dtype = samples[0].experts.shape[1:], samples[0].experts.dtype
            experts = torch.full((*shape, *choices), no_expert(dtype), dtype=dtype)
        for row, sample in enumerate(samples):
            start, end = len(sample.prompt.ids), int(lengths[row])
            tokens[row, :end] = torch.tensor(sample.prompt.ids + sample.ids)
            mask[row, start:end] = True if sample.mask is None else torch.tensor(sample.mask)
            logprobs[row, start:end] = torch.tensor(sample.logprobs)
            versions[row, start:end] = torch.tensor(sample.version)
            if experts is not None and sample.experts is not None:
                experts[row, : end - 1] = sample.experts
        return cls(
            tokens=tokens,
            lengths=lengths,
            mask=mask,
            mu_logprobs=torch.where(mask, logprobs, 0.0),
            rewards=torch.tensor([s.reward for s in samples]),
            groups=torch.tensor([s.group for s in samples]),
            truncated=torch.tensor([s.truncated for s in samples]),
            versions=versions * mask,
            experts=experts,
        )


@dataclass(frozen=True, kw_only=True)
class ScoredBatch(Batch):
    """A batch with log-probs of the learner before the update."""

    # [batch, seq] fp32, nats: under the learner's policy pi; None if neither loss nor metric needs them
    pi_logprobs: torch.Tensor | None
    reference_logprobs: torch.Tensor | None = (
        None  # [batch, seq] fp32, nats: under the first weights
    )

    @property
    def pi(self) -> torch.Tensor:
        """[batch, seq] fp32: pi_logprobs of a batch that has them. Raises ValueError for another."""
        if self.pi_logprobs is None:
            raise ValueError("the batch was not scored by the learner")
        return self.pi_logprobs

    def with_advantages(self, advantages: torch.Tensor) -> "TrainBatch":
        """The same with advantages [batch, seq]."""
        scored = {field.name: getattr(self, field.name) for field in fields(ScoredBatch)}
        return TrainBatch(**scored, advantages=advantages)


@dataclass(frozen=True, kw_only=True)
class TrainBatch(ScoredBatch):
    """A scored batch with advantages: what the loss needs."""

    advantages: torch.Tensor  # [batch, seq] fp32


def compact(experts: torch.Tensor, count: int) -> torch.Tensor:
    """Expert indices in the smallest dtype: uint8 for up to 255 experts, else int16.

    experts: -1 for no expert, which becomes `no_expert` of the dtype. count: of experts.
    """
    dtype = torch.uint8 if count <= 255 else torch.int16
    return experts.to(dtype)  # in uint8, -1 wraps to 255


def no_expert(dtype: torch.dtype) -> int:
    """The expert index that stands for none."""
    return 255 if dtype is torch.uint8 else -1


def statistics(
    batch: Batch, group: torch.distributed.ProcessGroup | None = None
) -> dict[str, float]:
    """Metrics of a batch over the ranks of `group` (None: this rank alone).

    batch/samples and batch/prompts_digest are a run's ledger: the same prompts at the same steps, however
    often it is resumed.
    """
    sums = torch.tensor(
        [
            len(batch),
            batch.rewards.sum(),
            batch.mask.sum(),
            batch.truncated.sum(),
            batch.lengths.sum(),
            _without_signal(batch.rewards, batch.groups).sum(),
            _digest(batch),
        ],
        dtype=torch.float64,  # exact for integers
        device=batch.tokens.device,
    )
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    count, rewards, response, truncated, tokens, idle, digest = sums.tolist()
    return {
        "batch/samples": int(count),
        "batch/prompts_digest": int(digest),
        "reward/mean": rewards / count,
        "reward/without_signal_fraction": idle / count,
        "response/length_mean": response / count,
        "response/truncated_fraction": truncated / count,
        "tokens/step": int(tokens),
    }


def _digest(batch: Batch) -> torch.Tensor:
    """[]: a checksum of the prompts that does not depend on their order or ranks."""
    position = torch.arange(1, batch.tokens.shape[1] + 1, device=batch.tokens.device)
    is_prompt = (position <= batch.lengths[:, None]) & (batch.mask.cumsum(1) == 0)
    values = (batch.tokens + 1) * position**2 % 1_000_003 * is_prompt
    return (values.sum(1) ** 2 % 1_000_003).sum()


def _without_signal(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[batch]: whether all samples of a sample's prompt have the same reward, so that none is learnt from."""
    _, group_index = groups.unique(return_inverse=True)
    bounds = rewards.new_zeros(2, int(group_index.max()) + 1)
    for row, reduce in zip(bounds, ("amin", "amax"), strict=True):
        row.scatter_reduce_(0, group_index, rewards, reduce, include_self=False)
    return (bounds[0] == bounds[1])[group_index]
