"""The gated delta rule and what comes before it in plain torch, where fla's Triton kernels do not run.

Names, arguments and roundings are fla's (flash-linear-attention): arithmetic in fp32, results in the
dtype that came. Packed sequences are those between `cu_seqlens`; nothing runs from one to the next.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import pad, silu

CHUNK = 64  # tokens; within a chunk products, from chunk to chunk a state


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Over the last dimension."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Each channel's weighted sum of its last numbers, through SiLU. x: [batch, seq, channels]; weight: [channels, width]."""
    seq, width = x.shape[1], weight.shape[1]
    ends = [0, seq] if cu_seqlens is None else cu_seqlens.tolist()
    position = torch.cat([torch.arange(end - start) for start, end in pairwise(ends)]).to(x.device)
    wide, taps = x.float(), weight.float()
    total = wide * taps[:, -1]
    for back in range(1, width):
        before = pad(wide, (0, 0, back, 0))[:, :seq]
        total = total + before * (position >= back)[:, None] * taps[:, -1 - back]
    return silu(total if bias is None else total + bias.float()).to(x.dtype), None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per head, with a state S [key, value]: S <- exp(g) S; S <- S + beta k (v - S'k)'; out = S'q / sqrt(key).

    q, k: [batch, seq, heads, key]; v: [batch, seq, heads, value]; g, beta: [batch, seq, heads]. initial_state:
    [batch, heads, key, value], by default 0, of packed sequences too. Returns the last state besides. By
    chunks: Yang, Kautz, Hatamizadeh, Gated Delta Networks (arXiv 2412.06464), section 3.3.
    """
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    # Each sequence begins a chunk: what fills its last one has k = beta = g = 0 and changes nothing.
    starts = [0, *accumulate(-(-length // CHUNK) for length in lengths)]
    place = torch.cat(
        [torch.arange(n) + at * CHUNK for n, at in zip(lengths, starts, strict=False)]
    ).to(q.device)

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """[chunks, batch, heads, CHUNK, ...] in fp32."""
        room = x.new_zeros(x.shape[0], starts[-1] * CHUNK, *x.shape[2:], dtype=torch.float32)
        filled = room.index_copy(1, place, x.float()).unflatten(1, (-1, CHUNK))
        return filled.transpose(2, 3).transpose(0, 1)

    query, key, value, rate = (chunks(x) for x in (q, k, v, beta))
    query, rate = query * q.shape[-1] ** -0.5, rate[..., None]
    decay = chunks(g).cumsum(-1)[..., None]  # its logarithm, since the chunk began
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (decay - decay.mT).masked_fill(later, -torch.inf).exp()
    # What each token writes depends on what those before it wrote: a triangular system.
    system = (key * rate @ key.mT) * between
    solve = torch.linalg.solve_triangular
    written = solve(system, value * rate, upper=False, unitriangular=True)
    read = solve(system, key * rate * decay.exp(), upper=False, unitriangular=True)
    within = (query @ key.mT) * between
    state = initial_state
    if state is None:
        state = query.new_zeros(*query.shape[1:3], q.shape[-1], v.shape[-1])
    outputs, current = [], state
    for i in range(starts[-1]):
        current = state if i in starts else current
        new = written[i] - read[i] @ current
        outputs.append((query[i] * decay[i].exp()) @ current + within[i] @ new)
        last = decay[i][..., -1:, :]
        current = current * last.exp() + (key[i] * (last - decay[i]).exp()).mT @ new
    output = torch.stack(outputs).transpose(0, 1).transpose(2, 3).flatten(1, 2)
    return output[:, place].to(v.dtype), current
