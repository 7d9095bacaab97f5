"""Gated delta nets' kernels in plain torch, against transformers' token-by-token recurrence."""

import json
from itertools import accumulate, pairwise

import torch
from transformers.models.qwen3_next import modeling_qwen3_next as reference

from megatron_fp16rl.platform.delta_rule import (
    CHUNK,
    causal_conv1d,
    chunk_gated_delta_rule,
    l2norm,
)
from megatron_fp16rl.rollout.server import _served_as
from tests import models

LENGTHS = [5, CHUNK * 2 + 2, CHUNK, 1, CHUNK + 6]
ENDS = torch.tensor([0, *accumulate(LENGTHS)])
TOKENS = int(ENDS[-1])
HEADS, KEY, VALUE, WIDTH = 4, 8, 6, 4


def recurrence(q, k, v, g, beta):
    return reference.torch_recurrent_gated_delta_rule(
        *(q, k, v, g, beta),
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=True,
    )[0]


def apart(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def test_packed_sequences_and_their_gradients_are_those_of_each_alone():
    torch.manual_seed(0)
    shapes = [(HEADS, KEY), (HEADS, KEY), (HEADS, VALUE), (HEADS,), (HEADS,)]
    *qkv, g, beta = (torch.randn(1, TOKENS, *shape) for shape in shapes)
    inputs = [x.requires_grad_() for x in (*qkv, -g.abs(), beta.sigmoid())]
    weights = torch.randn(1, TOKENS, HEADS, VALUE)

    def run(outputs):
        return outputs.detach(), torch.autograd.grad((outputs * weights).sum(), inputs)

    def ours(ends):
        q, k, *others = inputs
        return chunk_gated_delta_rule(l2norm(q), l2norm(k), *others, cu_seqlens=ends)[0]

    alone = [recurrence(*(x[:, a:b] for x in inputs)) for a, b in pairwise(ENDS.tolist())]
    output, gradients = run(ours(ENDS))
    expected, expected_gradients = run(torch.cat(alone, 1))
    assert apart(output, expected) < 2e-6
    for gradient, theirs in zip(gradients, expected_gradients, strict=True):
        assert apart(gradient, theirs) < 5e-6
    run_together = ours(None)
    assert apart(run_together, expected) > 0.1  # a state that ran on would show
    assert apart(run_together, recurrence(*inputs)) < 2e-6


def test_a_packed_convolution_sees_its_own_sequence_only():
    torch.manual_seed(0)
    x, weight = torch.randn(1, TOKENS, 7), torch.randn(7, WIDTH)
    alone = [
        reference.causal_conv1d_fn(x[:, a:b].transpose(1, 2), weight, activation="silu")
        for a, b in pairwise(ENDS.tolist())
    ]
    expected = torch.cat(alone, 2).transpose(1, 2)
    assert apart(causal_conv1d(x, weight, cu_seqlens=ENDS)[0], expected) < 1e-6
    assert apart(causal_conv1d(x, weight)[0], expected) > 0.01


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    shapes = [(HEADS, KEY), (HEADS, KEY), (HEADS, VALUE), (HEADS,), (HEADS,)]
    q, k, v, g, beta = (torch.randn(1, 100, *shape).half() for shape in shapes)
    g, beta = -g.float().abs(), beta.sigmoid()
    output, _ = chunk_gated_delta_rule(q, k, v, g, beta)
    wide, _ = chunk_gated_delta_rule(q.float(), k.float(), v.float(), g, beta.float())
    assert output.dtype is torch.float16
    assert torch.equal(output, wide.half())


def test_a_server_is_told_keys_that_transformers_writes_otherwise(tmp_path):
    """SGLang 0.5.23 reads these three, and knows no layer_types or rope_parameters."""
    models.hf_model(models.QWEN3_NEXT, tmp_path / "next")
    models.hf_model(models.QWEN3, tmp_path / "other")
    assert _served_as(tmp_path / "other") == []
    (option,) = _served_as(tmp_path / "next")
    name, _, keys = option.partition("=")
    assert name == "--json-model-override-args"
    assert json.loads(keys) == {
        "full_attention_interval": 2,
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
    }
