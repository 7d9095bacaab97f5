"""`precision.head: fp32` in both engines: agreement after a sync, and a mismatch that shows where one lacks it."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from megatron_fp16rl.rollout import server as servers
from megatron_fp16rl.rollout.client import Client
from tests import models
from tests.conftest import run_ranks

SEQUENCES = models.random_tokens(14, (60,) * 32)


def raise_logits(tensors):
    """Adds one vector to all tokens' weights: log-probs stay, but of logits in fp16 much is rounded away."""
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    head += 8 * torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_server_computes_fp32_logits_of_the_weights_that_were_sent_last(tied, tmp_path):
    config = {**models.QWEN3, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    stale = models.whole_folder(tmp_path / "stale", **config)
    sent = {**config, "initializer_range": 0.2}
    models.hf_model(sent, tmp_path / "sent", vocabulary=len(models.ALPHABET) + 2)
    models.edit_tensors(tmp_path / "sent", raise_logits)
    wanted = servers.ServerConfig("fp16", head="fp32")
    started = servers.start(wanted, stale, tmp_path, tmp_path, 0)
    try:
        servers.wait_until_healthy([started], 300, lambda line: None)
        client = Client(started.endpoint, 60)
        before = client.score(SEQUENCES)
        (learnt,) = run_ranks(
            1,
            "head.serve",
            endpoint=asdict(started.endpoint),
            folder=str(tmp_path / "sent"),
            sequences=SEQUENCES,
        )
        served = client.score(SEQUENCES)
    finally:
        servers.stop_servers([started])
    assert abs(np.subtract(served, before)).max() > 1
    both, one_alone = (abs(np.subtract(served, learnt[head])).mean() for head in ("fp32", "null"))
    assert both < 0.3 * one_alone
