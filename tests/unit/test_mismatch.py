"""Mismatch metrics against their formulas in NumPy."""

import numpy as np
import pytest
import torch

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, ScoredBatch, statistics
from megatron_fp16rl.metrics import mismatch


def batch_of(mu, pi, mask):
    rows = len(mask)
    return ScoredBatch(
        tokens=torch.zeros(mask.shape, dtype=torch.int64),
        lengths=torch.full((rows,), mask.shape[1]),
        mask=torch.tensor(mask),
        mu_logprobs=torch.tensor(mu * mask, dtype=torch.float32),
        rewards=torch.zeros(rows),
        groups=torch.arange(rows),
        truncated=torch.zeros(rows, dtype=torch.bool),
        versions=torch.zeros(mask.shape, dtype=torch.int32),
        pi_logprobs=torch.tensor(pi * mask, dtype=torch.float32),
    )


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


def test_equal_policies_have_none():
    mask = np.ones((3, 4), dtype=bool)
    mu = -np.arange(12.0).reshape(3, 4)
    ours = mismatch.measure(batch_of(mu, mu, mask))
    assert ours.pop("mismatch/ess") == ours.pop("mismatch/perplexity_ratio") == 1
    assert ours.pop("mismatch/perplexity_mu") == ours.pop("mismatch/perplexity_pi") > 1
    assert set(ours.values()) == {0.0}


def test_huge_ratios_stay_finite():
    mask = np.ones((2, 3), dtype=bool)
    ours = mismatch.measure(batch_of(np.full((2, 3), -800.0), np.zeros((2, 3)), mask))
    assert all(np.isfinite(value) for value in ours.values())


def test_weights_too_small_for_a_float_still_count_as_samples():
    """Of long responses every weight may be: to the share that serves as samples of pi, the largest is 1."""
    mask = np.ones((3, 4), dtype=bool)
    d = np.array([-400.0, -400.0 - np.log(2) / 4, -500.0])[:, None].repeat(4, 1)
    ours = mismatch.measure(batch_of(np.zeros((3, 4)), d, mask))
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
