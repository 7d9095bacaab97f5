"""Training-inference mismatch: the rollout policy mu (SGLang) against the learner's policy pi (Megatron).

Both have the same weights. With d = log pi - log mu of a sampled token, everything here would be zero if
the two engines rounded in the same way.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import ScoredBatch

_MAX_LOG_WEIGHT = 300.0  # exp(2 * 300) is still finite in float64
_PERCENTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True)
class Clip:
    """The range of ratios in which PPO's clipping lets a token learn; by_sequence: as GSPO clips."""

    low: float
    high: float
    by_sequence: bool = False


def measure(
    batch: ScoredBatch, group: dist.ProcessGroup | None = None, clip: Clip | None = None
) -> dict[str, float]:
    """The mismatch of a batch that both engines scored with the same weights; see `compare`."""
    return {f"mismatch/{name}": value for name, value in compare(batch, group, clip).items()}


def compare(
    batch: ScoredBatch, group: dist.ProcessGroup | None = None, clip: Clip | None = None
) -> dict[str, float]:
    """pi against mu over response tokens, exact over the ranks of `group` (None: this rank alone).

    Keys:
      logprob_abs_mean, _max, _p50, _p99, _p999   of |d| over tokens
      kl_k1, kl_k3        estimators of KL[mu || pi] a token: mean of -d; mean of exp(d) - 1 - d
                          (Schulman, "Approximating KL divergence", 2020)
      kl_seq              the first of them a response: mean of -D, D = sum of d over a response
      seq_log_ratio_mean, seq_log_ratio_std   of D over responses
      slope_per_1k_tokens   of D against the response's length, least squares, times 1,000
                          (arXiv 2510.26788, figure 2)
      ratio_outside_fraction   of tokens with pi / mu outside [0.5, 2]
      phantom_clip_fraction    of tokens with pi / mu outside `clip`, [1 - low, 1 + high]: where the weights are
                          the same, clipping at mu would stop them though nothing was learnt
      perplexity_mu, perplexity_pi, perplexity_ratio   exp of minus the mean log-prob; pi over mu
      ess                 (sum w)^2 / (n sum w^2) with w = exp(D): 1 means that samples of mu serve
                          as samples of pi
      chi2_seq            mean of w^2, minus 1: chi-squared divergence of pi from mu
    """
    largest = _log_weights(batch).max()
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = _sums(batch, largest)
    if clip is not None:
        sums["phantom"] = _outside(batch, clip)
    reduced = torch.stack(list(sums.values()))
    if group is not None:
        dist.all_reduce(reduced, group=group)
    return {
        **_means(dict(zip(sums, reduced.tolist(), strict=True)), largest.item()),
        **_tails((batch.pi - batch.mu_logprobs).abs()[batch.mask], group),
    }


def _log_weights(batch: ScoredBatch) -> torch.Tensor:
    """[batch] float64: D of each response, bounded from above."""
    d = (batch.pi.double() - batch.mu_logprobs.double()) * batch.mask
    return d.sum(1).clamp(max=_MAX_LOG_WEIGHT)


def _sums(batch: ScoredBatch, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over this rank's tokens and responses, float64 without dimensions; from them follow all means.

    largest: of the responses' log-weights, over all ranks. Weights are relative to it: of long responses all may be
    smaller than any float64.
    """
    mu, pi = batch.mu_logprobs.double() * batch.mask, batch.pi.double() * batch.mask
    d = pi - mu
    ratio = d.clamp(max=_MAX_LOG_WEIGHT)
    sequence, length = d.sum(1), batch.mask.sum(1).double()
    weight = (_log_weights(batch) - largest).exp()
    return {
        "tokens": length.sum(),
        "n": d.new_tensor(len(d)),
        "absolute": d.abs().sum(),
        "k1": -d.sum(),
        "k3": (torch.expm1(ratio) - ratio).sum(),
        "D": sequence.sum(),
        "DD": (sequence**2).sum(),
        "w": weight.sum(),
        "ww": (weight**2).sum(),
        "ll": (length**2).sum(),
        "lD": (length * sequence).sum(),
        "outside": (d.abs() > math.log(2)).sum().double(),
        "mu": mu.sum(),
        "pi": pi.sum(),
    }


def _outside(batch: ScoredBatch, clip: Clip) -> torch.Tensor:
    d = (batch.pi.double() - batch.mu_logprobs.double()) * batch.mask
    if clip.by_sequence:
        d = (d.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp(min=1)).expand_as(d)
    ratio = d.clamp(max=_MAX_LOG_WEIGHT).exp()
    outside = (ratio < 1 - clip.low) | (ratio > 1 + clip.high)
    return (outside & batch.mask).sum().double()


def _means(s: dict[str, float], largest: float) -> dict[str, float]:
    """The metrics of `measure` that follow from sums over all ranks; largest: see `_sums`."""
    tokens, n = s["tokens"], s["n"]
    mean = s["D"] / n
    spread = s["ll"] / n - (tokens / n) ** 2
    slope = (s["lD"] / n - mean * tokens / n) / spread if spread > 1e-9 else 0.0
    phantom = {"phantom_clip_fraction": s["phantom"] / tokens} if "phantom" in s else {}
    return {
        **phantom,
        "logprob_abs_mean": s["absolute"] / tokens,
        "kl_k1": s["k1"] / tokens,
        "kl_k3": s["k3"] / tokens,
        "kl_seq": -mean,
        "seq_log_ratio_mean": mean,
        "seq_log_ratio_std": max(s["DD"] / n - mean**2, 0.0) ** 0.5,
        "slope_per_1k_tokens": 1000 * slope,
        "ratio_outside_fraction": s["outside"] / tokens,
        "perplexity_mu": _exp(-s["mu"] / tokens),
        "perplexity_pi": _exp(-s["pi"] / tokens),
        "perplexity_ratio": _exp((s["mu"] - s["pi"]) / tokens),
        "ess": s["w"] ** 2 / (n * s["ww"]),
        "chi2_seq": s["ww"] / n * math.exp(2 * largest) - 1,
    }


def _tails(sizes: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Maximum and percentiles of |d|, over all ranks; a percentile is one of the values."""
    ordered = _all_gather(sizes.float(), group).sort().values
    metrics = {"logprob_abs_max": ordered[-1].item()}
    for name, share in _PERCENTILES.items():
        index = max(math.ceil(share * len(ordered)) - 1, 0)
        metrics[f"logprob_abs_{name}"] = ordered[index].item()
    return metrics


def _all_gather(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The values of all ranks. None may be negative: -1 pads them to one length."""
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return values
    longest = torch.tensor(len(values), device=values.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    padded = values.new_full((int(longest),), -1.0)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    gathered = torch.cat(parts)
    return gathered[gathered >= 0]


def _exp(x: float) -> float:
    return math.exp(min(x, _MAX_LOG_WEIGHT))
