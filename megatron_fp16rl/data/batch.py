"""What flows through the loop: prompts, samples, and the batch of tensors made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Prompt:
    """A question and what its answer must be. `ids` are the tokens sent to the server."""

    text: str
    ids: list[int]
    answer: str
    index: int = -1  # of the problem in its data


@dataclass(frozen=True)
class Sample:
    """One response, as the server gave it."""

    prompt: Prompt
    group: int  # samples of one prompt share it
    ids: list[int]  # response tokens, the end-of-sequence token included
    logprobs: list[float]  # of those tokens under mu, at the sampling temperature, nats
    text: str
    truncated: bool  # ran into max_new_tokens
    version: int  # of the weights that made it
    reward: float
    experts: torch.Tensor | None = None  # [tokens - 1, layers, top_k], see Batch


@dataclass
class Batch:
    """Right-padded sequences. Entry t of a [batch, seq] tensor belongs to token t.

    The log-prob of token t is that of the token given all tokens before it.
    """

    tokens: torch.Tensor  # [batch, seq] int64
    lengths: torch.Tensor  # [batch] int64, prompt and response
    mask: torch.Tensor  # [batch, seq] bool, true at response tokens
    mu_logprobs: torch.Tensor  # [batch, seq] fp32, nats; zero outside mask, as are all below
    rewards: torch.Tensor  # [batch] fp32
    groups: torch.Tensor  # [batch] int64
    truncated: torch.Tensor  # [batch] bool
    pi_logprobs: torch.Tensor | None = None  # [batch, seq] fp32: the learner's, before the update
    reference_logprobs: torch.Tensor | None = None  # [batch, seq] fp32: of the first weights
    advantages: torch.Tensor | None = None  # [batch, seq] fp32
    # [batch, seq, layers, top_k] as `compact` makes them: the experts to which the server sent a token,
    # for router replay, or `no_expert` (padding, the last token, layers without experts). They are many
    # times the rest, so they stay on the host wherever that is, and a learner has its own layers alone.
    experts: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def replace(self, **tensors: torch.Tensor | None) -> "Batch":
        """A copy with some tensors replaced."""
        return replace(self, **tensors)

    def to(self, device: torch.device) -> "Batch":
        """A copy on another device; records of experts stay where they are."""
        return self._each(lambda name, value: value if name == "experts" else value.to(device))

    def rows(self, index: torch.Tensor | Sequence[int], seq: int | None = None) -> "Batch":
        """The sequences at `index` [n], cut to `seq` tokens: those of the longest if none are given."""
        index = torch.as_tensor(index)
        if seq is None:
            seq = int(self.lengths[index.to(self.lengths.device)].max())

        places = {
            torch.device("cpu"): index.cpu(),
            self.tokens.device: index.to(self.tokens.device),
        }

        def pick(_: str, value: torch.Tensor) -> torch.Tensor:
            place = places[value.device]
            return value[place, :seq] if value.dim() > 1 else value[place]

        return self._each(pick)

    def padded(self, rows: int, seq: int) -> "Batch":
        """The same with padding up to [rows, seq]; a row more has no response token."""

        def widen(name: str, value: torch.Tensor) -> torch.Tensor:
            shape = (rows, seq, *value.shape[2:])[: value.dim()]
            if value.shape == shape:
                return value
            wide = value.new_full(shape, no_expert(value.dtype) if name == "experts" else 0)
            wide[tuple(slice(size) for size in value.shape)] = value
            return wide

        return self._each(widen)

    def _each(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{n: None if v is None else change(n, v) for n, v in values.items()})

    @classmethod
    def from_token_ids(cls, sequences: list[list[int]]) -> "Batch":
        """Sequences to be scored: every token but the first counts as a response token."""
        prompts = [Prompt("", ids[:1], "") for ids in sequences]
        zeros = [[0.0] * (len(ids) - 1) for ids in sequences]
        return cls.from_samples(
            [
                Sample(prompt, group, ids[1:], logprobs, "", False, 0, 0.0)
                for group, (prompt, ids, logprobs) in enumerate(
                    zip(prompts, sequences, zeros, strict=True)
                )
            ]
        )

    @classmethod
    def from_samples(cls, samples: list[Sample]) -> "Batch":
        """Pads samples into a batch, in their order."""
        lengths = torch.tensor([len(s.prompt.ids) + len(s.ids) for s in samples])
        shape = (len(samples), int(lengths.max()))
        tokens = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        logprobs = torch.zeros(shape)
        experts = None
        if samples[0].experts is not None:
            choices, dtype = samples[0].experts.shape[1:], samples[0].experts.dtype
            experts = torch.full((*shape, *choices), no_expert(dtype), dtype=dtype)
        for row, sample in enumerate(samples):
            start, end = len(sample.prompt.ids), int(lengths[row])
            tokens[row, :end] = torch.tensor(sample.prompt.ids + sample.ids)
            mask[row, start:end] = True
            logprobs[row, start:end] = torch.tensor(sample.logprobs)
            if experts is not None:
                experts[row, : end - 1] = sample.experts
        return cls(
            tokens=tokens,
            lengths=lengths,
            mask=mask,
            mu_logprobs=logprobs,
            rewards=torch.tensor([s.reward for s in samples]),
            groups=torch.tensor([s.group for s in samples]),
            truncated=torch.tensor([s.truncated for s in samples]),
            experts=experts,
        )


def compact(experts: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of experts, of which there are `count`, in as few bytes as they take.

    experts: -1 where there is none, which becomes `no_expert` of the result's dtype: uint8 up to 255
    experts, else int16.
    """
    dtype = torch.uint8 if count <= 255 else torch.int16
    return experts.to(dtype)  # in uint8, -1 wraps to 255


def no_expert(dtype: torch.dtype) -> int:
    """What stands in a record where it has no expert."""
    return 255 if dtype is torch.uint8 else -1


def dealt(lengths: list[int], ranks: int) -> list[list[int]]:
    """Indices of sequences for each rank: as many for each, of about as many tokens in all."""
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for start in range(0, len(lengths), ranks):  # a round: one for each, the longest to the poorest
        poorest_first = sorted(range(ranks), key=lambda rank: (tokens[rank], rank))
        for rank, i in zip(poorest_first, longest_first[start : start + ranks], strict=True):
            shares[rank].append(i)
            tokens[rank] += lengths[i]
    return shares


def dealt_for_updates(
    lengths: Sequence[int], order: Sequence[int], size: int, ranks: int
) -> list[list[int]]:
    """Indices for each rank, of all updates one after the other; `size` in `order` make an update."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        for share, mine in zip(shares, dealt([lengths[i] for i in rows], ranks), strict=True):
            share += [rows[i] for i in mine]
    return shares


def statistics(
    batch: Batch, group: torch.distributed.ProcessGroup | None = None
) -> dict[str, float]:
    """What a batch is like, over the ranks of `group` (None: this rank alone).

    Samples and digest are a run's ledger: equal prompts at equal steps, however often it was resumed.
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
        dtype=torch.float64,  # exact for whole numbers
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
    """[]: a number that other prompts would hardly have; of sequences in any order, on any ranks."""
    place = torch.arange(1, batch.tokens.shape[1] + 1, device=batch.tokens.device)
    is_prompt = (place <= batch.lengths[:, None]) & ~batch.mask
    values = (batch.tokens + 1) * place**2 % 1_000_003 * is_prompt
    return (values.sum(1) ** 2 % 1_000_003).sum()


def _without_signal(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[batch]: whether all samples of a sample's prompt earn the same."""
    _, place = groups.unique(return_inverse=True)
    bounds = rewards.new_zeros(2, int(place.max()) + 1)
    for row, extreme in zip(bounds, ("amin", "amax"), strict=True):
        row.scatter_reduce_(0, place, rewards, extreme, include_self=False)
    return (bounds[0] == bounds[1])[place]


@dataclass(frozen=True)
class Part:
    """A micro-batch: which sequences of a batch, and the [rows, seq] to which they are padded."""

    sequences: list[int]
    shape: tuple[int, int]

    def of(self, batch: Batch) -> Batch:
        """The sequences themselves."""
        return batch.rows(self.sequences, self.shape[1]).padded(*self.shape)


def padded_length(length: int, multiple: int) -> int:
    """The next multiple. Kernels are planned and compiled for each shape, so there are to be few."""
    return -(-length // multiple) * multiple


def padded_shapes(
    parts: list[list[int]], lengths: Sequence[int], multiple: int, alike: bool = False
) -> list[tuple[int, int]]:
    """[rows, seq] of the micro-batches that `cut` and `divide` made. alike: one shape for all."""
    shapes = [(len(part), padded_length(lengths[part[-1]], multiple)) for part in parts]
    if alike:
        return [(max(rows for rows, _ in shapes), max(seq for _, seq in shapes))] * len(shapes)
    return shapes


def cut(
    lengths: Sequence[int], budget: int, multiple: int = 1, alike: bool = False
) -> list[list[int]]:
    """Cuts sequences into micro-batches: indices, of like length, the shortest first.

    budget: padded tokens of each, at most, unless one sequence has more. multiple: see `padded_length`.
    alike: all micro-batches are padded to the longest sequence of all.
    """
    longest, parts = max(lengths), [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):  # the newest is the longest
        padded = padded_length(longest if alike else lengths[i], multiple)
        if parts[-1] and (len(parts[-1]) + 1) * padded > budget:
            parts.append([])
        parts[-1].append(i)
    return parts


def divide(parts: list[list[int]], lengths: Sequence[int], wanted: int) -> list[list[int]]:
    """`wanted` micro-batches or more: the largest is cut in two again and again.

    Fewer if there are not so many sequences.
    """
    parts = list(parts)
    while len(parts) < wanted:
        divisible = [i for i, part in enumerate(parts) if len(part) > 1]
        if not divisible:
            break
        at = max(divisible, key=lambda i: len(parts[i]) * lengths[parts[i][-1]])
        half = len(parts[at]) // 2
        parts[at : at + 1] = [parts[at][:half], parts[at][half:]]
    return parts
