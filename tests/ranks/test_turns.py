"""Updates from samples of several turns against transformers: what an environment wrote is not learnt."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import models
from tests.conftest import run_ranks
from tests.workers.turns import samples

CP2, PP2 = {"context_parallel": 2}, {"pipeline_parallel": 2}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
CASES = [
    ("token_mean", 2, {}),  # whose ranks have unequal numbers of tokens
    ("token_mean", 4, {**TP2, **PP2}),
    ("sequence_mean", 1, {"packing": False}),
    ("sequence_mean", 2, CP2),
]
# By the aggregation of the loss.
ALGORITHMS = {
    "token_mean": {"loss": "ppo_clip", "aggregation": "token_mean", "advantage": "dr_grpo"},
    "sequence_mean": {"loss": "gspo", "aggregation": "sequence_mean", "advantage": "dr_grpo"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.hf_model(models.QWEN3, folder)
    return folder


@pytest.fixture(scope="module")
def references(folder):
    """Of each algorithm: loss and gradients."""
    return {name: reference(folder, name) for name in ALGORITHMS}


def reference(folder, aggregation, clip=0.2):
    """The formulas written out, one sequence and one token after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drawn, losses = samples(), []
    for sample in drawn:
        of_prompt = [other.reward for other in drawn if other.group == sample.group]
        advantage = sample.reward - np.mean(of_prompt)
        ids = sample.prompt.ids + sample.ids
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(sample.prompt.ids)
        log_ratios = [
            logprobs[start + i - 1, token] - mu
            for i, (token, mu, sampled) in enumerate(
                zip(sample.ids, sample.logprobs, sample.mask, strict=True)
            )
            if sampled
        ]
        if aggregation == "sequence_mean":
            log_ratios = [sum(log_ratios) / len(log_ratios)]
        ratios = [torch.exp(one) for one in log_ratios]
        losses.append(
            [max(-advantage * r, -advantage * r.clamp(1 - clip, 1 + clip)) for r in ratios]
        )
    if aggregation == "sequence_mean":
        loss = sum(one for (one,) in losses) / len(losses)
    else:
        loss = sum(map(sum, losses)) / sum(map(len, losses))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def apart(folder, tmp_path, aggregation, expected, ranks=1, layout=None, learnt=False):
    """Differences from a reference: of the loss, and the largest of gradients, relative to their size."""
    results = run_ranks(
        ranks,
        "turns.update",
        folder=str(folder),
        layout=layout or {},
        algorithm=ALGORITHMS[aggregation],
        file=str(tmp_path / "gradients"),
        learnt=learnt,
    )
    loss, gradients = expected[aggregation]
    ours = torch.load(tmp_path / "gradients")
    largest = max(
        ((ours[name] - gradient).abs().max() / gradient.abs().max()).item()
        for name, gradient in gradients.items()
        if name in ours
    )
    return abs(results[-1]["loss"] / loss - 1), largest, results[-1]["tokens"]


@pytest.mark.parametrize(("aggregation", "ranks", "layout"), CASES)
def test_an_update_from_several_turns_is_that_of_the_formulas(
    folder, references, tmp_path, aggregation, ranks, layout
):
    sampled = sum(sum(sample.mask) for sample in samples())
    loss, gradients, tokens = apart(folder, tmp_path, aggregation, references, ranks, layout)
    assert loss < 1e-4
    assert gradients < 1e-4
    assert tokens == sampled


@pytest.mark.parametrize("aggregation", ALGORITHMS)
def test_the_check_sees_an_environments_tokens_learnt(folder, references, tmp_path, aggregation):
    loss, gradients, _ = apart(folder, tmp_path, aggregation, references, learnt=True)
    assert loss > 1e-2
    assert gradients > 1e-1
