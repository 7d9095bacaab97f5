"""What sampling ahead needs: a thread, batches of several versions, staleness, losses anchored at mu."""

import threading

import pytest
import torch

from megatron_fp16rl.data.batch import Batch, Prompt, Sample
from megatron_fp16rl.metrics import mismatch, staleness
from megatron_fp16rl.rollout.background import Background
from tests import models
from tests.unit.losses import algorithm


def sample(group: int, version: int | list[int], length: int) -> Sample:
    prompt = Prompt("", [1] * (group + 1), "")
    return Sample(prompt, group, [2] * length, [-0.5] * length, "", False, version, 0.0)


def test_jobs_run_one_after_the_other_in_one_thread_that_ends_with_the_process():
    background, seen = Background("work"), []

    def work(name):
        seen.append(name)
        return threading.current_thread()

    first = background.start(lambda: work("a"))
    failed = background.start(lambda: [][0])
    last = background.start(lambda: work("b"))
    # Reward workers die with the thread that started them: it must not be another for each batch.
    assert first.result() is last.result()
    assert last.result().daemon
    assert seen == ["a", "b"]
    with pytest.raises(IndexError):  # where the result is read
        failed.result()


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


ON_MU = {"old_policy": "rollout"}
REJECT = {"ratio": "token", "action": "reject", "high": 2}


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, True),
        (ON_MU, False),
        ({**ON_MU, "loss": "dppo_tv"}, False),
        ({**ON_MU, "kl": {"coefficient": 0.1}}, True),
        ({**ON_MU, "kl": {"coefficient": 0.1, "anchor": "rollout"}}, False),
        ({**ON_MU, "correction": REJECT}, True),
    ],
)
def test_a_score_pass_is_made_where_the_algorithm_needs_it(settings, needs):
    """And where it says that it needs none, advantages and loss do without."""
    made = algorithm(**settings)
    assert made.settings.needs_scores is needs
    if needs:
        return
    batch = Batch.from_samples([sample(0, 0, 3), sample(0, 0, 2)]).scored(None)
    prepared = made.prepare(batch)
    losses, _ = made.token_losses(batch.mu_logprobs.clone().requires_grad_(), prepared)
    assert losses.shape == batch.mask.shape
    with pytest.raises(ValueError, match="was not scored"):
        _ = prepared.pi


def test_a_loss_that_does_not_know_who_sampled_is_refused():
    rollout = {**models.recipe().rollout.model_dump(), "ahead": 1}
    with pytest.raises(ValueError, match=r"rollout.ahead=1: .* set algorithm.old_policy: rollout"):
        models.recipe(rollout=rollout)
    correction = {"ratio": "token", "action": "truncate", "high": 2.0}
    assert models.recipe(rollout=rollout, algorithm={"correction": correction}).rollout.ahead == 1
