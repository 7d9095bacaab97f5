"""How far the sampling policy mu (SGLang) and the learning policy pi (Megatron) are apart.

Same weights, other kernels: with d = log pi - log mu of a sampled token, everything here would be
zero if the two engines rounded alike.
"""

import torch

from megatron_fp16rl.batch import Batch

_MAX_LOG_WEIGHT = 300.0  # exp(2 * 300) is still finite in float64


def measure(batch: Batch, group: torch.distributed.ProcessGroup | None = None) -> dict[str, float]:
    """Mismatch over response tokens, exact over the ranks of `group` (None: this rank alone).

    Of the batch it reads mask, mu_logprobs and pi_logprobs. Keys, all under "mismatch/":
      logprob_abs_mean    mean |d| over tokens
      kl_k1, kl_k3        estimators of KL[mu || pi] a token: mean of -d; mean of exp(d) - 1 - d
                          (Schulman, "Approximating KL divergence", 2020)
      seq_log_ratio_mean, seq_log_ratio_std   of D = sum of d over a response, over sequences
      ess                 (sum w)^2 / (n sum w^2) with w = exp(D): 1 means that samples of mu serve
                          as samples of pi
      chi2_seq            mean of w^2, minus 1: chi-squared divergence of pi from mu
    """
    d = (batch.pi_logprobs.double() - batch.mu_logprobs.double()) * batch.mask
    ratio = d.clamp(max=_MAX_LOG_WEIGHT)
    sequence = d.sum(1)
    weight = sequence.clamp(max=_MAX_LOG_WEIGHT).exp()
    sums = torch.stack(
        [
            batch.mask.sum().double(),
            d.new_tensor(len(d)),
            d.abs().sum(),
            -d.sum(),
            (torch.expm1(ratio) - ratio).sum(),
            sequence.sum(),
            (sequence**2).sum(),
            weight.sum(),
            (weight**2).sum(),
        ]
    )
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    tokens, n, absolute, k1, k3, total, squares, weights, weights_squared = sums.tolist()
    mean = total / n
    return {
        "mismatch/logprob_abs_mean": absolute / tokens,
        "mismatch/kl_k1": k1 / tokens,
        "mismatch/kl_k3": k3 / tokens,
        "mismatch/seq_log_ratio_mean": mean,
        "mismatch/seq_log_ratio_std": max(squares / n - mean**2, 0.0) ** 0.5,
        "mismatch/ess": weights**2 / (n * weights_squared),
        "mismatch/chi2_seq": weights_squared / n - 1,
    }
