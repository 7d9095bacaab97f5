"""Mismatch metrics against their formulas in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, statistics
from megatron_fp16rl.metrics import mismatch


def batch_of(mu, pi, mask):
    mask = torch.tensor(mask)
    ids = [[0] * mask.shape[1]] * len(mask)
    mu, pi = (torch.tensor(x, dtype=torch.float32) * mask for x in (mu, pi))
    return replace(Batch.from_token_ids(ids), mask=mask, mu_logprobs=mu).scored(pi)


def test_against_numpy():
    generator = np.random.default_rng(1)
    mask = generator.random((6, 9)) < 0.8
    mu = generator.normal(-2, 1, mask.shape)
    pi = mu + generator.normal(0, 0.5, mask.shape)
    d = np.where(mask, pi.astype(np.float32) - mu.astype(np.float32), 0).astype(np.float64)
    tokens, sequence = mask.sum(), d.sum(1)
    weights = np.exp(sequence)
    sizes = np.sort(np.abs(d)[mask])
    expected = {
        "logprob_abs_mean": np.abs(d).sum() / tokens,
        "logprob_abs_max": sizes[-1],
        "logprob_abs_p50": np.quantile(sizes, 0.5, method="inverted_cdf"),
        "logprob_abs_p99": np.quantile(sizes, 0.99, method="inverted_cdf"),
        "logprob_abs_p999": np.quantile(sizes, 0.999, method="inverted_cdf"),
        "kl_seq": -sequence.mean(),
        "slope_per_1k_tokens": 1000 * np.polyfit(mask.sum(1), sequence, 1)[0],
        "ratio_outside_fraction": (np.abs(d) > np.log(2))[mask].mean(),
        "perplexity_mu": np.exp(-mu[mask].mean()),
        "perplexity_pi": np.exp(-pi[mask].mean()),
        "perplexity_ratio": np.exp(-d.sum() / tokens),
        "kl_k1": -d.sum() / tokens,
        "kl_k3": (np.exp(d) - 1 - d)[mask].sum() / tokens,
        "seq_log_ratio_mean": sequence.mean(),
        "seq_log_ratio_std": sequence.std(),
        "ess": weights.sum() ** 2 / (len(weights) * (weights**2).sum()),
        "chi2_seq": (weights**2).mean() - 1,
    }
    expected["phantom_clip_fraction"] = ((np.exp(d) < 0.7) | (np.exp(d) > 1.5))[mask].mean()
    ours = mismatch.measure(batch_of(mu, pi, mask), clip=mismatch.Clip(0.3, 0.5))
    assert set(ours) == {f"mismatch/{key}" for key in expected}
    for key, value in expected.items():
        assert ours[f"mismatch/{key}"] == pytest.approx(value, rel=1e-4, abs=1e-9), key


def test_phantom_clips_of_sequences_are_of_geometric_means():
    mask = np.array([[True, True, True], [True, True, False]])
    d = np.array([[0.3, -0.3, 0.1], [0.3, 0.3, 9.0]])
    batch, clip = batch_of(np.zeros((2, 3)), d, mask), mismatch.Clip(0.2, 0.2, by_sequence=True)
    assert mismatch.compare(batch, clip=clip)["phantom_clip_fraction"] == pytest.approx(2 / 5)


def test_ratios_beyond_a_float_stay_finite():
    """Of long responses every weight may be too small: to the share that serves as samples of pi, the largest is 1."""
    mask = np.ones((3, 4), dtype=bool)
    zeros = np.zeros(mask.shape)
    ours = mismatch.measure(batch_of(np.full(mask.shape, -800.0), zeros, mask))
    assert all(np.isfinite(value) for value in ours.values())
    d = np.array([-400.0, -400.0 - np.log(2) / 4, -500.0])[:, None].repeat(4, 1)
    ours = mismatch.measure(batch_of(zeros, d, mask))
    assert all(np.isfinite(value) for value in ours.values())
    assert ours["mismatch/ess"] == pytest.approx(1.5**2 / (3 * 1.25), rel=1e-3)
    assert ours["mismatch/chi2_seq"] == -1


def test_the_digest_of_a_batch_tells_prompts_apart_and_nothing_else():
    def digest(prompts, response, order=lambda samples: samples):
        samples = [
            Sample(Prompt("", ids, ""), group, response, [0.0] * len(response), "", False, 0, 1.0)
            for group, ids in enumerate(prompts)
        ]
        return statistics(Batch.from_samples(order(samples)))["batch/prompts_digest"]

    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
    ledger = digest(prompts, [7])
    assert ledger == digest(prompts, [8, 2, 2], order=lambda samples: samples[::-1])
    assert digest([[3, 1, 4], [1, 5], [1, 5]], [7]) != ledger  # one lost, one twice
    assert digest([[3, 4, 1], [1, 5], [9, 2, 6, 5]], [7]) != ledger
    assert digest([[0, 3, 1, 4], [1, 5], [9, 2, 6, 5]], [7]) != ledger
