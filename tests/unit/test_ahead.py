"""What sampling ahead needs: a thread, batches of several versions, staleness, losses anchored at mu."""

import threading

import pytest
import torch

from megatron_fp16rl.algorithms import Algorithm
from megatron_fp16rl.data.batch import Batch, Prompt, Sample
from megatron_fp16rl.metrics import mismatch, staleness
from megatron_fp16rl.recipe import Algorithm as Settings
from megatron_fp16rl.rollout.background import Background
from tests import models


def sample(group: int, version: int | list[int], length: int) -> Sample:
    prompt = Prompt("", [1] * (group + 1), "")
    return Sample(prompt, group, [2] * length, [-0.5] * length, "", False, version, 0.0)


def test_jobs_run_one_after_the_other_in_one_thread_that_ends_with_the_process():
    background, seen = Background("work"), []

    def work(name):
        seen.append(name)
        return name, threading.current_thread()

    jobs = [background.start(lambda name=name: work(name)) for name in "abc"]
    results = [job.result() for job in jobs]
    assert [name for name, _ in results] == seen == [*"abc"]
    threads = {thread for _, thread in results}
    # Reward workers die with the thread that started them: it must not be another for each batch.
    assert len(threads) == 1
    assert threads.pop().daemon


def test_an_error_of_the_thread_is_raised_where_the_result_is_read():
    background = Background("work")
    failed = background.start(lambda: [][0])
    with pytest.raises(IndexError):
        failed.result()
    assert background.start(lambda: 7).result() == 7


def test_versions_are_counted_over_response_tokens():
    batch = Batch.from_samples([sample(0, [3, 4, 4], 3), sample(1, 5, 1)])
    assert batch.versions.tolist() == [[0, 3, 4, 4], [0, 0, 5, 0]]
    assert staleness.versions(batch, 5) == {
        "staleness/versions_mean": 1.0,
        "staleness/versions_max": 2,
    }


def test_joined_micro_batches_measure_as_the_batch_does():
    """In another order, cut and padded apart, with rows that are padding alone."""
    samples = [sample(i, 0, length) for i, length in enumerate((3, 1, 4, 2, 5))]
    batch = Batch.from_samples(samples)
    torch.manual_seed(0)
    scored = batch.scored(torch.randn(batch.tokens.shape) * batch.mask)
    parts = [scored.rows([3, 1]).padded(4, 12), scored.rows([4, 0, 2])]
    joined = type(scored).joined(parts)
    assert joined.lengths.tolist() == batch.lengths[[3, 1, 4, 0, 2]].tolist()
    assert mismatch.measure(joined) == pytest.approx(mismatch.measure(scored))


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, True),
        ({"old_policy": "rollout"}, False),
        ({"old_policy": "rollout", "loss": "gspo"}, False),
        ({"old_policy": "rollout", "loss": "dppo_tv"}, False),
        ({"old_policy": "rollout", "kl": {"coefficient": 0.1}}, True),
        ({"old_policy": "rollout", "kl": {"coefficient": 0.1, "anchor": "rollout"}}, False),
        (
            {
                "old_policy": "rollout",
                "correction": {"ratio": "token", "action": "reject", "high": 2},
            },
            True,
        ),
    ],
)
def test_a_score_pass_is_made_where_the_algorithm_needs_it(settings, needs):
    """And where it says that it needs none, advantages and loss do without."""
    algorithm = Algorithm(Settings(**settings), 8)
    assert algorithm.settings.needs_scores is needs
    if needs:
        return
    batch = Batch.from_samples([sample(0, 0, 3), sample(0, 0, 2)]).scored(None)
    prepared = algorithm.prepare(batch)
    losses, _ = algorithm.token_losses(batch.mu_logprobs.clone().requires_grad_(), prepared)
    assert losses.shape == batch.mask.shape
    with pytest.raises(ValueError, match="was not scored"):
        _ = prepared.pi


def test_a_loss_that_does_not_know_who_sampled_is_refused():
    rollout = {**models.recipe().rollout.model_dump(), "ahead": 1}
    with pytest.raises(ValueError, match=r"rollout.ahead=1: .* set algorithm.old_policy: rollout"):
        models.recipe(rollout=rollout)
    correction = {"ratio": "token", "action": "truncate", "high": 2.0}
    assert models.recipe(rollout=rollout, algorithm={"correction": correction}).rollout.ahead == 1
