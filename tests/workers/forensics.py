"""Faults that are put into a learner, and what it says of them."""

from functools import partial
from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch
from tests import models
from tests.workers.common import (
    _rollout,
    answered,
    family_recipe,
    fp16_recipe,
    join_world,
    make_learner,
    my_share,
)


def faults(layout: dict, family: str, cases: dict[str, dict], lora: dict | None = None) -> dict:
    """What is said and kept of faults; see _breaking and _acting for the keys of a case."""
    import tempfile

    from megatron_fp16rl.learner.nonfinite import NonFinite
    from megatron_fp16rl.models.build import model_folder

    world = join_world(**layout)
    recipe = family_recipe(
        *(family, layout, lora),
        learner={"micro_batch_tokens": 40},  # four sequences
        precision={"loss_scale": {"max_skips": 2}},
    )
    folder = model_folder(recipe.model)
    learner = make_learner(recipe, world, folder)
    modules = [m for gpt in learner.model.gpt_models for m in gpt.modules()]

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    results, at_first = {}, hooks()
    for name, case in cases.items():
        learner.load(folder)
        learner.begin_step(7)
        _breaking(learner, case)
        before = learner.scaler.scale.item()
        try:
            _acting(learner, case)
            result = {"said": "nothing"}
        except NonFinite as error:
            kept = Path(tempfile.mkdtemp())
            error.save(kept)
            files = {str(f.relative_to(kept)): f.read_text() for f in kept.rglob("*.json")}
            result = {"said": f"{type(error).__name__}: {error}", "files": files}
        result["scales"] = [before, learner.scaler.scale.item()]
        result["skipped"] = learner.scaler.skipped_total
        result["hooks"] = hooks() - at_first
        results[name] = result
    return results


def _breaking(learner: object, case: dict) -> None:
    """multiply: parameters, by what; poison: a parameter and the rank of its shard; scale: of loss.

    fill_adapters: with something other than zero.
    """
    shards = {s.name: s for s in (*learner.model.weights, *learner.model.adapters)}
    if "fill_adapters" in case:
        learner.model.set_adapters(models.lively_adapter)
    with torch.no_grad():
        for name, factor in case.get("multiply", {}).items():
            if name in shards:
                shards[name].parameter.mul_(factor)
        name, rank = case.get("poison", ("", -1))
        if learner.world.rank == rank:
            shards[name].parameter.view(-1)[0] = torch.nan
    learner.scaler.scale.fill_(case.get("scale", 2.0**15))
    finalize = learner.model.config.finalize_model_grads_func

    def overflow_in_reduction(*args: object, **options: object) -> None:
        finalize(*args, **options)
        shards[next(iter(shards))].main_grad.fill_(torch.inf)

    if "reduction" in case:
        learner.model.config.finalize_model_grads_func = overflow_in_reduction


def _acting(learner: object, case: dict) -> None:
    """do: update, score or prepare; loss: [group, factor] of one sample's; reward, mu: [row, value]."""
    whole = answered()
    groups = torch.arange(16)
    for name, tensor in (("reward", whole.rewards), ("mu", whole.mu_logprobs[:, 5])):
        for row, value in case.get(name, []):
            tensor[row] = float(value)
    if case["do"] == "prepare":
        groups //= 4
    batch = my_share(whole.replace(groups=groups), learner.world)
    if case["do"] == "prepare":
        learner.prepare(batch.scored(batch.mu_logprobs))
        return
    if case["do"] == "score":
        learner.score(batch)
        return

    def token_losses(logprobs: torch.Tensor, rows: Batch) -> tuple[torch.Tensor, dict]:
        group, factor = case.get("loss", (0, 1.0))
        factors = torch.where(rows.groups == group, float(factor), 1.0)
        return -logprobs * rows.mask * factors[:, None], {}

    for _ in range(2):  # max_skips
        learner.train_update(batch, token_losses, batch.mask.sum().float())


def magnitudes(folder: str, scale: float, sequences: list[list[int]]) -> dict:
    """What is said of an update in which all is finite, and the largest magnitudes of each layer."""
    from megatron_fp16rl.learner.trace import trace

    world = join_world()
    settings = {"global_batch_size": 4}
    recipe = models.recipe(
        learner=settings, rollout=_rollout(), precision={"loss_scale": {"initial": scale}}
    )
    learner = make_learner(recipe, world, folder)
    batch = Batch.from_token_ids(sequences)

    def rerun() -> None:
        learner.supervised_update(batch)

    origin, layers = trace(learner.model, rerun)
    return {"said": str(origin), "layers": layers}


def compare_layers(folder: str, served: dict[str, list[str]], sequences: list[list[int]]) -> dict:
    """Hidden states in fp32, kept in a file; and what is found against states that were served."""
    from safetensors.torch import load_file, save_file

    from megatron_fp16rl.learner.loading import load
    from megatron_fp16rl.learner.model import Model
    from megatron_fp16rl.models.config import load_config
    from megatron_fp16rl.models.folder import HFFolder
    from megatron_fp16rl.models.spec import describe
    from megatron_fp16rl.tools.study.layers import compare, learner_states

    world = join_world()
    model = {}
    for dtype in ("fp32", "fp16"):
        model[dtype] = Model(describe(load_config(Path(folder)), world.layout), dtype, world)
        load(model[dtype], HFFolder(folder))
    reference = [learner_states(model["fp32"], ids) for ids in sequences]
    result = {"file": f"{next(iter(served.values()))[0]}.learnt"}
    save_file({k: v.contiguous() for k, v in reference[0].items()}, result["file"])
    for name, files in served.items():
        states = (
            (load_file(file), learner_states(model["fp16"], ids), exact)
            for file, ids, exact in zip(files, sequences, reference, strict=True)
        )
        result[name] = compare(states, "fp16")
    return result


def stream(folder: str, layout: dict) -> dict:
    """An fp16 update of a model whose residual stream is beyond fp16: in fp16, and in fp32."""
    from megatron_fp16rl.learner.nonfinite import NonFinite

    world = join_world(**layout)
    batch = Batch.from_token_ids(models.random_tokens())
    results = {}
    for name, options in (("half", {}), ("full", {"fp32_residual_connection": True})):
        recipe = fp16_recipe(world.layout, **options)
        learner = make_learner(recipe, world, folder)
        seen, sizes = set(), [0.0]

        def look(_: object, __: object, output: object, seen=seen, sizes=sizes) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.add(str(hidden.dtype))
            sizes.append(hidden.detach().abs().max().item())

        for gpt in learner.model.gpt_models:
            for layer in gpt.decoder.layers:
                layer.register_forward_hook(look)
        try:
            outcome, loss = learner.supervised_update(my_share(batch, world))
            result = {"said": "nothing", "stepped": outcome.stepped, "loss": loss}
            result["grad_norm"] = outcome.grad_norm
        except NonFinite as error:
            result = {"said": f"{type(error).__name__}: {error}"}
        results[name] = {**result, "stream": sorted(seen), "largest": max(sizes)}
    return results


def normed_apart() -> dict:
    """Norms and projections of a dense layer and of two with experts, as where Transformer Engine has them fused."""
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.platform import local_layers

    recipe = family_recipe("qwen3-moe", {"ranks": 1})
    config = make_learner(recipe, join_world(), model_folder(recipe.model)).model.config
    config.moe_layer_freq = [0, 1]
    block = local_layers.block_spec(config, None)

    class Apart:
        pass

    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = None
    block.layer_norm = None
    local_layers.norm_stream_in_fp32(block, Apart)
    parts = [layer.submodules for layer in block.layer_specs]
    norms = [block.layer_norm]
    norms += [norm for part in parts for norm in (part.input_layernorm, part.pre_mlp_layernorm)]
    projections = [part.self_attention.submodules.linear_qkv for part in parts]
    projections += [getattr(part.mlp.keywords["submodules"], "linear_fc1", None) for part in parts]
    return {
        "norms": [f"{norm.__module__}.{norm.__name__}" for norm in norms],
        "projections": [one.__name__ for one in projections if one is not None],
    }


def ranges(folders: list[str], highest: int) -> list[dict]:
    """How near fp16 models come to its limits, by folder: in a forward pass, and in updates at rising loss scales.

    highest: the exponent of the last of them.
    """
    world, results = join_world(), []
    batch = Batch.from_token_ids(models.random_tokens())
    for folder in folders:
        learner = make_learner(fp16_recipe(world.layout), world, folder)
        (gpt,) = learner.model.gpt_models
        seen = dict.fromkeys(("activation", "stream", "gradient"), 0.0)

        def see(what: str, tensor: "torch.Tensor", seen=seen) -> None:
            seen[what] = max(seen[what], tensor.detach().abs().max().item())

        def look(_: object, __: object, output: object, what: str) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(hidden) and hidden.is_floating_point() and hidden.numel():
                see(what, hidden)
                if what == "stream" and hidden.requires_grad:
                    hidden.register_hook(partial(see, "gradient"))

        for layer in gpt.decoder.layers:
            layer.register_forward_hook(partial(look, what="stream"))
            for name, module in layer.named_modules():
                if name and not list(module.children()):
                    module.register_forward_hook(partial(look, what="activation"))
        weight = max(shard.parameter.abs().max().item() for shard in learner.model.weights)
        learner.supervised_update(learner.share(batch))
        found = {"weight": weight, **seen}
        for exponent in range(15, 1 + highest):
            learner.load(Path(folder))
            learner.scaler.scale.fill_(2.0**exponent)
            outcome, _ = learner.supervised_update(learner.share(batch))
            if not outcome.stepped:
                found |= {"scale": exponent, "source": outcome.overflow_source}
                break
        results.append(found)
    return results
