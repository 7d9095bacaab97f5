"""What runs on the ranks of tests/ranks/test_platform.py: with patches, without one, with stand-ins."""

import torch

from megatron_fp16rl.data.batch import Batch
from tests import models
from tests.workers.common import (
    _rollout,
    fp32_recipe,
    gradients_of,
    join_world,
    make_learner,
    my_share,
)


def without_patch(patch: str | None, folder: str, layout: dict) -> dict:
    """One step of the learner without one of the patches of Megatron-core.

    compiler: whether what a rank imports has imported torch's compiler.
    """
    import sys

    from megatron_fp16rl.platform import cpu

    cpu.MEGATRON_PATCHES = [p for p in cpu.MEGATRON_PATCHES if p.name != patch]
    world = join_world(**layout)
    from megatron_fp16rl.platform import local_attention

    if patch == "latent-widths":
        local_attention.FusedAttention = local_attention.DotProductAttention
    settings = {**world.layout.model_dump(), "global_batch_size": 4, "micro_batch_tokens": 48}
    learner = make_learner(models.recipe(learner=settings, rollout=_rollout()), world, folder)
    batch = Batch.from_token_ids(models.random_tokens())
    outcome = str(learner.supervised_update(my_share(batch, world)))
    import megatron_fp16rl.train  # noqa: F401

    return {"outcome": outcome, "compiler": "torch._inductor.compile_fx" in sys.modules}


def import_sglang(without: str, module: str) -> None:
    """Imports a module of SGLang without one of the patches."""
    import importlib

    from megatron_fp16rl.platform import cpu_sglang

    kept = [patch for patch in cpu_sglang.IMPORT_PATCHES if patch.name != without]
    cpu_sglang.IMPORT_PATCHES = kept
    cpu_sglang.prepare_sglang()
    importlib.import_module(module)


def half_products(installs: int, dtype: str) -> list[bool]:
    """Whether products of halves are those in fp32, rounded once, when half_gemm was installed so often."""
    from megatron_fp16rl.platform import half_gemm

    for _ in range(installs):
        half_gemm.install()
    torch.manual_seed(0)
    a, b, c = torch.randn(2, 64, 1000), torch.randn(2, 1000, 128), torch.randn(2, 64, 128)
    of_half = getattr(torch, dtype)
    half = [tensor.to(of_half) for tensor in (a, b, c)]
    products = (
        lambda a, b, c: a[0] @ b[0],
        lambda a, b, c: b[0].t() @ a[0].t(),
        lambda a, b, c: a @ b,
        lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0.5),
        lambda a, b, c: torch.baddbmm(c, a, b, beta=0.0, alpha=0.1),
        lambda a, b, c: torch.nn.functional.linear(a, b[0].t(), c[0, 0]),
    )
    exact = [product(*(tensor.float() for tensor in half)) for product in products]
    ours = [product(*half) for product in products]
    return [
        x.dtype is of_half and torch.equal(x, y.to(of_half))
        for x, y in zip(ours, exact, strict=True)
    ]


def stock_latent_attention(folder: str, layout: dict) -> list[float]:
    """The gradient of the shared key's projection, from Megatron's layers and from ours.

    Returns how far they are apart, relative to ours: latent rows, rows of the shared key.
    """
    import dataclasses

    from megatron_fp16rl.models.families import FAMILIES
    from megatron_fp16rl.models.layouts import Cut

    world = join_world(**layout)
    from megatron_fp16rl.platform import local_mla

    def gradient() -> torch.Tensor:
        learner = make_learner(fp32_recipe(world.layout), world, folder)
        learner.supervised_update(my_share(Batch.from_token_ids(models.random_tokens()), world))
        gradients = gradients_of(learner.model)
        return gradients.get("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", torch.zeros(40))

    ours = gradient()
    family = FAMILIES["deepseek_v3"]
    rules = tuple(
        dataclasses.replace(r, layout=Cut(0)) if "_down_proj" in r.megatron else r
        for r in family.rules
    )
    FAMILIES["deepseek_v3"] = dataclasses.replace(family, rules=rules)
    local_mla.LatentSelfAttention = local_mla.MLASelfAttention
    apart = gradient() - ours
    rank = models.DEEPSEEK_V3["kv_lora_rank"]
    parts = (apart[:rank], ours[:rank]), (apart[rank:], ours[rank:])
    return [(difference.norm() / whole.norm()).item() for difference, whole in parts]


def as_transformer_engine(folder: str, layout: dict) -> dict:
    """A model of latent attention with what Transformer Engine's layers would bring.

    fused: whether its layers add up gradients unrounded, as it is and where the recipe is against it.
    rope: whether rope would be fused, which Megatron has for YaRN alone here.
    """
    from megatron_fp16rl import platform
    from megatron_fp16rl.learner.model import Model

    world = join_world(**layout)
    build = Model._build

    def marked(model: Model, chunk: int) -> object:
        gpt = build(model, chunk)
        gpt.decoder.layers[0].self_attention.linear_proj.fuse_wgrad_accumulation = False
        return gpt

    Model._build = marked
    learner = make_learner(fp32_recipe(world.layout), world, folder)
    options, here = platform.current().transformer_options(), platform.current()
    here.transformer_options = lambda: {**options, "apply_rope_fusion": True}
    against = fp32_recipe(world.layout, megatron={"gradient_accumulation_fusion": False})
    both = [learner.model, make_learner(against, world, folder).model]
    layers = [model.gpt_models[0].decoder.layers[0].self_attention for model in both]
    return {
        "fused": [layer.linear_proj.fuse_wgrad_accumulation for layer in layers],
        "rope": both[1].config.apply_rope_fusion,
    }


def projections_of_transformer_engine() -> dict:
    """What projects queries and keys of a latent layer without low-rank queries, where a layer with a norm is to be had.

    Before and after a model was built.
    """
    from types import SimpleNamespace

    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver

    class Plain: ...

    class WithNorm: ...

    def chosen() -> dict:
        resolver = object.__new__(QKNormConfigResolver)
        parts = {"linear_q_proj": Plain, "q_layernorm": IdentityOp, "kv_layernorm": IdentityOp}
        resolver.submodules = SimpleNamespace(
            **parts, linear_q_up_proj=None, linear_kv_up_proj=None
        )
        resolver.config = SimpleNamespace(qk_l2_norm=False, qk_layernorm=True)
        resolver.has_q_lora = resolver.is_dsa = False
        resolver.linear_impl, resolver.fused_norm_linear_impl = Plain, WithNorm
        resolver._is_fused_norm_linear = lambda module: module is WithNorm
        return {name: kind.__name__ for name, kind in resolver.resolve().items()}

    stock = chosen()
    from megatron_fp16rl.learner import workarounds

    workarounds.project_queries_as_they_are()
    return {"stock": stock, "ours": chosen()}
