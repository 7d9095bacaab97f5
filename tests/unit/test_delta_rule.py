"""Gated delta nets' kernels in plain torch, against transformers' token-by-token recurrence."""

import json
from itertools import accumulate, pairwise

import torch
from torch.nn.functional import softplus
from transformers.models.qwen3_next import modeling_qwen3_next as reference

from megatron_fp16rl.platform import cpu_sglang_delta as served
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
KEY_HEADS, HEADS, KEY, VALUE, WIDTH = 2, 4, 8, 6, 4
SIZES = [KEY_HEADS * KEY, KEY_HEADS * KEY, HEADS * VALUE]  # of queries, keys and values


def recurrence(q, k, v, g, beta):
    return reference.torch_recurrent_gated_delta_rule(
        *(q, k, v, g, beta),
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=True,
    )[0]


def convolved(x, weight):
    """x: [tokens, channels]."""
    return reference.causal_conv1d_fn(x.T[None], weight, activation="silu")[0].T


def apart(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def random_inputs(tokens):
    """Queries, keys, values, the decay's logarithms and beta."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, size) for size in (KEY, KEY, VALUE))
    g, beta = torch.randn(2, 1, tokens, HEADS)
    return [q, k, v, -g.abs(), beta.sigmoid()]


def test_packed_sequences_and_their_gradients_are_those_of_each_alone():
    inputs = [x.requires_grad_() for x in random_inputs(TOKENS)]
    weights = torch.randn(1, TOKENS, HEADS, VALUE)

    def gradients(outputs):
        return torch.autograd.grad((outputs * weights).sum(), inputs)

    def ours(ends):
        q, k, *others = inputs
        return chunk_gated_delta_rule(l2norm(q), l2norm(k), *others, cu_seqlens=ends)[0]

    alone = [recurrence(*(x[:, a:b] for x in inputs)) for a, b in pairwise(ENDS.tolist())]
    output, expected = ours(ENDS), torch.cat(alone, 1)
    assert apart(output, expected) < 2e-6
    for gradient, theirs in zip(gradients(output), gradients(expected), strict=True):
        assert apart(gradient, theirs) < 5e-6
    run_together = ours(None)
    assert apart(run_together, expected) > 0.1  # a state that ran on would show
    assert apart(run_together, recurrence(*inputs)) < 2e-6


def test_a_packed_convolution_sees_its_own_sequence_only():
    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, 7), torch.randn(7, WIDTH)
    expected = torch.cat([convolved(x[a:b], weight) for a, b in pairwise(ENDS.tolist())])
    assert apart(causal_conv1d(x[None], weight, cu_seqlens=ENDS)[0][0], expected) < 1e-6
    assert apart(causal_conv1d(x[None], weight)[0][0], expected) > 0.01


def test_half_precision_is_rounded_once():
    inputs = [x.half() for x in random_inputs(100)]
    output, _ = chunk_gated_delta_rule(*inputs)
    wide, _ = chunk_gated_delta_rule(*(x.float() for x in inputs))
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


def heads_of(mixed):
    """Queries, keys and values of a convolution's output."""
    sizes = (KEY_HEADS, KEY), (KEY_HEADS, KEY), (HEADS, VALUE)
    parts = zip("qkv", mixed.split(SIZES, -1), sizes, strict=True)
    return {name: x.reshape(1, -1, *size) for name, x, size in parts}


def test_servers_go_on_from_the_states_that_they_keep():
    """Two requests: a first part of the prompt, the rest of it, then token by token."""
    torch.manual_seed(0)
    channels = sum(SIZES)
    weight, A_log, dt_bias = torch.randn(channels, WIDTH), torch.rand(HEADS), torch.rand(HEADS)
    # As other requests left them. SGLang clears the states of a slot that it gives to a request.
    conv, states = torch.randn(5, channels, WIDTH - 1), torch.randn(5, HEADS, VALUE, KEY)
    slots = torch.tensor([3, 1])
    states[slots] = 0
    lengths = [CHUNK + 16, 13]
    sequences = [[torch.randn(n, size) for size in (channels, HEADS, HEADS)] for n in lengths]
    outputs = [[], []]

    def extend(cuts, first=False):
        ends = torch.tensor([0, *accumulate(end - start for start, end in cuts)])
        cut = [[x[slice(*c)] for x in xs] for xs, c in zip(sequences, cuts, strict=True)]
        x, a, b = (torch.cat(parts) for parts in zip(*cut, strict=True))
        mixed = served.causal_conv1d_fn_cpu(
            *(x.T, weight, None),
            conv_states=conv,
            has_initial_state=torch.tensor([not first] * 2),
            cache_indices=slots,
            query_start_loc=ends,
        )
        decay, beta = served.fused_gdn_gating_cpu(A_log, a, b, dt_bias)
        own = {"initial_state": states, "initial_state_indices": slots, "cu_seqlens": ends}
        output, _, _ = served.chunk_gated_delta_rule_cpu(
            **heads_of(mixed.T), g=decay, beta=beta, **own
        )
        for kept, new in zip(outputs, output[0].tensor_split(ends[1:-1]), strict=True):
            kept.append(new)

    def decode(*at):
        rows = [[x[n] for x in xs] for xs, n in zip(sequences, at, strict=True)]
        x, a, b = (torch.stack(parts) for parts in zip(*rows, strict=True))
        mixed = served.causal_conv1d_update_cpu(
            x, conv, weight, None, "silu", conv_state_indices=slots
        )
        own = {"initial_state_source": states, "initial_state_indices": slots}
        output = served.fused_sigmoid_gating_delta_rule_update_cpu(
            **heads_of(mixed), a=a, b=b, A_log=A_log, dt_bias=dt_bias, **own
        )
        for kept, new in zip(outputs, output[0], strict=True):
            kept.append(new[None])

    ends = [n - 5 for n in lengths]
    extend([(0, ends[0] - 5), (0, 2)], first=True)  # two tokens: fewer than a convolution sees
    extend([(ends[0] - 5, ends[0]), (2, ends[1])])
    for token in range(5):
        decode(*(end + token for end in ends))
    for parts, (x, a, b) in zip(outputs, sequences, strict=True):
        q, k, v = heads_of(convolved(x, weight)).values()
        q, k = (y.repeat_interleave(HEADS // KEY_HEADS, 2) for y in (q, k))
        decay = -A_log.exp() * softplus(a + dt_bias)
        expected = recurrence(q, k, v, decay[None], b.sigmoid()[None])[0]
        assert apart(torch.cat(parts), expected) < 5e-6
