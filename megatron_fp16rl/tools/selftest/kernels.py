"""Row kernels: the parts of a layer one by one, each from the inputs that it had, against fp64."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.products import units_apart
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

_ROPE_BASE = 1e6
_MODEL: dict[str, Any] = {
    **models.TINY["qwen3"],
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rope_theta": _ROPE_BASE,
    "rms_norm_eps": 1e-6,
}
_TOKENS, _FEW, _LONG = 2048, 512, 32768
_QUERIES = 64  # whose attention is computed again
# Units of the last place, at the most. fp32 inside and rounded once is half a unit; a factor that was rounded
# before, as cosines of unfused rope or silu's value are, adds up to one more.
_NORM, _ROPE, _ACTIVATION, _ATTENTION = 1.5, 3.0, 2.0, 2.0
_Parts = dict[str, torch.Tensor]


def kernels(setting: Setting) -> list[Check]:
    """Norm, rope, attention and activation of a dense layer in fp16, on one long sequence."""
    on_gpu = platform.current().NAME == "cuda"
    tokens = _LONG if on_gpu else _FEW if setting.quick else _TOKENS
    folder = setting.folder / "model"
    models.hf_model({**_MODEL, "max_position_embeddings": tokens}, folder)
    learner = models.learner(folder, models.world(), "fp16", settings=models.packing(tokens))
    kernel = learner.forward.attention.kernel(tokens)
    parts = _captured(learner, tokens)
    exact = {
        "norm of queries": (_normed, _NORM),
        "rope": (_rotated, _ROPE),
        "attention": (_attended, _ATTENTION),
        "activation": (_activated, _ACTIVATION),
    }
    checks = [
        at_most(f"{name}, units of the last place", units_apart(*reference(parts)), bound)
        for name, (reference, bound) in exact.items()
    ]
    name = kernel or "local"
    return [
        *checks,
        Check(name="attention's kernel", value=name, bound="not unfused", holds=name != "unfused"),
    ]


def _captured(learner: "Learner", tokens: int) -> _Parts:
    """What went into and came out of the layer's parts while a sequence of so many tokens was scored."""
    (chunk,) = learner.model.gpt_models
    layer, parts = chunk.decoder.layers[0], {}
    attention, mlp = layer.self_attention, layer.mlp

    def before(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, given: tuple[Any, ...], *__: Any) -> None:
            for position, value in enumerate(given):
                if isinstance(value, torch.Tensor):
                    parts[f"{name} {position}"] = value.detach()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: Any, result: Any) -> None:
            # Megatron's linear layers return their bias, too.
            parts[name] = (result[0] if isinstance(result, tuple) else result).detach()

        return hook

    hooks = [
        attention.q_layernorm.register_forward_pre_hook(before("norm's input")),
        attention.q_layernorm.register_forward_hook(after("norm")),
        attention.core_attention.register_forward_pre_hook(before("attention's input")),
        attention.core_attention.register_forward_hook(after("attention")),
        mlp.linear_fc1.register_forward_hook(after("gate and up")),
        mlp.linear_fc2.register_forward_pre_hook(before("activation")),
    ]
    parts["weight"] = attention.q_layernorm.weight.detach()
    try:
        learner.score(learner.share(Batch.from_token_ids(models.random_tokens(lengths=(tokens,)))))
    finally:
        for hook in hooks:
            hook.remove()
    return parts


def _normed(parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
    values = parts["norm's input 0"].double()
    scale = (values.pow(2).mean(-1, keepdim=True) + _MODEL["rms_norm_eps"]).rsqrt()
    return parts["norm"], values * scale * parts["weight"].double()


def _rotated(parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """By fp32 angles, which transformers and SGLang have: a product of 32,768 rounds to 1e-3 there."""
    width = _MODEL["head_dim"]
    ours = parts["attention's input 0"].reshape(-1, _MODEL["num_attention_heads"], width)
    values = parts["norm"].reshape(ours.shape).double()
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=values.device) / width
    positions = torch.arange(len(values), dtype=torch.float32, device=values.device)
    angles = torch.outer(positions, 1.0 / _ROPE_BASE**exponents).double()[:, None]
    angles = torch.cat([angles, angles], -1)
    half = torch.cat([-values[..., width // 2 :], values[..., : width // 2]], -1)
    return ours, values * angles.cos() + half * angles.sin()


def _attended(parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries spread over the sequence: all would be tokens x tokens in fp64."""
    width, heads = _MODEL["head_dim"], _MODEL["num_attention_heads"]
    query, key, value = (
        parts[f"attention's input {i}"].reshape(-1, count, width).double()
        for i, count in enumerate((heads, *2 * (_MODEL["num_key_value_heads"],)))
    )
    group = heads // key.shape[1]
    chosen = torch.linspace(0, len(query) - 1, _QUERIES, device=query.device).long()
    scores = torch.einsum("qhd,khd->hqk", query[chosen], key.repeat_interleave(group, 1))
    future = torch.arange(len(key), device=query.device) > chosen[:, None]
    shares = (scores / width**0.5).masked_fill(future, -torch.inf).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", shares, value.repeat_interleave(group, 1))
    return parts["attention"].reshape(len(query), heads, width)[chosen], exact


def _activated(parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = parts["gate and up"].double().chunk(2, -1)
    return parts["activation 0"], torch.nn.functional.silu(gate) * up
