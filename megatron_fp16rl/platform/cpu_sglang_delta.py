"""SGLang's kernels of gated delta nets on a CPU: those of sgl_kernel, and a Triton one, in plain torch.

With SGLang's names and arguments (0.5.23, layers/attention/linear/). Each request has a slot in two pools:
conv_states [slots, channels, width - 1], ssm_states [slots, heads, value, key].
"""

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu, softplus

from megatron_fp16rl.platform.delta_rule import causal_conv1d, chunk_gated_delta_rule, l2norm


def causal_conv1d_fn_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, conv_states: Tensor, **of: Any
) -> Tensor:
    """x: [channels, tokens], of several requests one after the other. Returns the same."""
    outputs = []
    kept = weight.shape[1] - 1
    slots, has_states = of["cache_indices"].tolist(), of["has_initial_state"].tolist()
    for request, (start, end) in enumerate(pairwise(of["query_start_loc"].tolist())):
        before = conv_states[slots[request]].to(x.dtype) * has_states[request]
        window = torch.cat([before, x[:, start:end]], 1)
        conv_states[slots[request]] = window[:, -kept:].to(conv_states.dtype)
        outputs.append(causal_conv1d(window.T[None], weight, bias)[0][0, kept:].T)
    return torch.cat(outputs, 1)


def causal_conv1d_update_cpu(
    x: Tensor, conv_states: Tensor, weight: Tensor, bias: Tensor | None, *_: Any, **of: Any
) -> Tensor:
    """x: [requests, channels], one token of each. Returns the same."""
    slots = of["conv_state_indices"]
    window = torch.cat([conv_states[slots].to(x.dtype), x[..., None]], 2)
    conv_states[slots] = window[..., 1:].to(conv_states.dtype)
    return causal_conv1d(window.mT, weight, bias)[0][:, -1]


def fused_gdn_gating_cpu(
    A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The decay's logarithm and beta, rounded as on a GPU. a, b: [tokens, heads]; both [1, tokens, heads] in fp32."""
    decay = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid().to(b.dtype).float()[None]


def chunk_gated_delta_rule_cpu(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, **of: Any
) -> tuple[Tensor, None, None]:
    """Of several requests one after the other. initial_state: the pool, which gets their last states."""
    q, k = (_for_values(l2norm(x), v) for x in (q, k))
    outputs = []
    slots = of["initial_state_indices"].tolist()
    for request, (start, end) in enumerate(pairwise(of["cu_seqlens"].tolist())):
        before = initial_state[slots[request]].mT[None].float()
        q_own, k_own, v_own, g_own, beta_own = (x[:, start:end] for x in (q, k, v, g, beta))
        output, state = chunk_gated_delta_rule(q_own, k_own, v_own, g_own, beta_own, before)
        initial_state[slots[request]] = state[0].mT.to(initial_state.dtype)
        outputs.append(output)
    return torch.cat(outputs, 1), None, None


def fused_sigmoid_gating_delta_rule_update_cpu(
    *, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **of: Any
) -> Tensor:
    """One token of each request; q, k, v: [1, requests, heads, width]. Writes the pool of states."""
    pool, slots = of["initial_state_source"], of["initial_state_indices"]
    decay, beta = fused_gdn_gating_cpu(of["A_log"], a, b, of["dt_bias"])
    query, key = (_for_values(l2norm(x.float()), v)[0, ..., None] for x in (q, k))
    state = pool[slots].float() * decay[0].exp()[..., None, None]
    new = (v[0].float()[..., None] - state @ key) * beta[0][..., None, None]
    state = state + new @ key.mT
    pool[slots] = state.to(pool.dtype)
    return ((state @ query)[..., 0] * q.shape[-1] ** -0.5).to(v.dtype)[None]


def _for_values(x: Tensor, v: Tensor) -> Tensor:
    """Each key head as often as it has value heads."""
    return x.repeat_interleave(v.shape[2] // x.shape[2], 2)


def fused_rmsnorm_gated_cpu(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Over the last dimension; rounded once, as on a GPU."""
    normed = rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    return (normed * silu(gate.float())).to(x.dtype)


def gate_shared_expert(
    hidden: Tensor, weight: Tensor, shared: Tensor, output: Tensor, *, do_add: bool
) -> None:
    """Writes or adds to `output` the shared expert's output times its gate; rounded once."""
    gate = (hidden.float() @ weight.float()).sigmoid()[:, None]
    output.copy_(shared.float() * gate + (output.float() if do_add else 0))


def install() -> None:
    module = sys.modules["sgl_kernel.mamba"] = ModuleType("sgl_kernel.mamba")
    for kernel in (causal_conv1d_fn_cpu, causal_conv1d_update_cpu, chunk_gated_delta_rule_cpu):
        setattr(module, kernel.__name__, kernel)
    operators: Any = torch.ops.sgl_kernel
    operators.fused_gdn_gating_cpu = fused_gdn_gating_cpu
    operators.fused_sigmoid_gating_delta_rule_update_cpu = (
        fused_sigmoid_gating_delta_rule_update_cpu
    )
    operators.fused_rmsnorm_gated_cpu = fused_rmsnorm_gated_cpu
    from sglang.kernels.ops.attention.fla import fused_norm_gate
    from sglang.kernels.ops.elementwise import elementwise

    fused_norm_gate._use_cpu = True  # by default on CPUs with AMX alone
    elementwise._launch_fused_gate_sigmoid_mul = gate_shared_expert
