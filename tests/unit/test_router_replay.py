"""Records of experts: as a server sends them, as a batch and files hold them."""

import base64
import json

import numpy as np
import pytest
import torch

from megatron_fp16rl.data.batch import Batch, Prompt, Sample, compact, no_expert
from megatron_fp16rl.models.spec import Routing
from megatron_fp16rl.rollout.client import ServerError, _experts
from megatron_fp16rl.rollout.recording import read_samples, write_samples


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([0, 0, 1, 2], None),
        ([0, 0, 1, 2, 3, 4], r"has 6 entries, not \(1, 2, 2\)"),
        ([0, 0, 2, 2], "not 2 different ones of 8"),
        ([0, 0, 2, 8], "not 2 different ones of 8"),
        ([0, 0, -1, 2], "not 2 different ones of 8"),
    ],
)
def test_impossible_records_are_refused(record, message):
    meta = {"routed_experts": base64.b64encode(np.array(record, np.int32).tobytes())}
    dense_first = Routing(sparse=(False, True), top_k=2, experts=8)
    if message is None:
        assert _experts(meta, 1, dense_first).tolist() == [[[255, 255], [1, 2]]]
        return
    with pytest.raises(ServerError, match=message):
        _experts(meta, 1, dense_first)


@pytest.mark.parametrize(("count", "dtype"), [(255, torch.uint8), (256, torch.int16)])
def test_records_take_the_smallest_dtype(tmp_path, count, dtype):
    """The last of 255 experts is not taken for none. Files of earlier versions have lists, with -1 for none."""
    chosen = torch.tensor([[[0, count - 1], [-1, -1]], [[7, 3], [-1, -1]]])
    experts = compact(chosen.int(), count)
    samples = [Sample(Prompt("", [2, 3], ""), 0, [4], [0.0], "4", False, 0, 0.0, experts)]
    batch = Batch.from_samples(samples)
    assert batch.experts.dtype is dtype
    assert batch.to(torch.device("meta")).experts is batch.experts  # they stay on the host
    known = batch.experts != no_expert(dtype)
    assert known[0, :, 0].tolist() == [[True, True], [True, True], [False, False]]
    write_samples(tmp_path, 0, 0, samples)
    (sample,) = read_samples(tmp_path, 0)
    assert sample.experts.dtype is dtype
    assert torch.equal(sample.experts, experts)
    file = tmp_path / "step_00000.leader_0.jsonl"
    old = {**json.loads(file.read_text()), "experts": chosen.tolist()}
    file.write_text(json.dumps(old))
    assert torch.equal(Batch.from_samples(read_samples(tmp_path, 0)).experts, batch.experts)
