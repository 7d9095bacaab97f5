"""What the ranks of a test do; see tests/ranks.py."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_fp16rl.batch import Batch
from megatron_fp16rl.learner.world import initialize
from megatron_fp16rl.recipe import Layout
from tests import models


def parity(folders: list[str], layout: dict) -> dict:
    """Log-probs, gradients and exported weights of models, to be compared with Hugging Face."""
    import torch

    from megatron_fp16rl.learner import Learner

    world = _world(**layout)
    batch = Batch.from_token_ids(models.random_tokens())
    mine = _my_share(batch, world)
    results = {}
    for folder in folders:
        recipe = _fp32_recipe(world.layout, micro_batch_tokens=48, **_sharding(layout))
        learner = Learner(recipe, Path(folder), world)
        model = learner.model
        exported = {name: tensor.clone() for name, tensor in learner.export()}
        logits = None
        if world.pipeline.size == 1:  # whole logits: gather this rank's columns
            logits = learner._logits(batch, model.chunks[0]).detach()
            columns = [torch.empty_like(logits) for _ in range(world.tensor.size)]
            torch.distributed.all_gather(columns, logits, group=world.tensor.group)
            logits = torch.cat(columns, -1)[..., : model.spec.shapes.vocabulary]
        scored = learner.score(batch).pi_logprobs
        outcome, loss = learner.supervised_step(mine)
        gradients = {}
        if not layout.get("distributed_optimizer"):
            gradients = dict(model.gather(lambda p: p.main_grad, torch.float32))
        file = Path(folder) / f"megatron-{world.rank}.pt"
        torch.save(
            {"logits": logits, "logprobs": scored, "exported": exported, "gradients": gradients},
            file,
        )
        results[folder] = {"loss": loss, "grad_norm": outcome.grad_norm, "file": str(file)}
    return results


def lora(folders: dict[str, dict], layout: dict, megatron: dict) -> dict:
    """What a learner with lively adapters computes, exports, saves and learns in one fp32 update.

    folders: of models, and the `learner.lora` of each.
    """
    import torch

    from megatron_fp16rl.learner import Learner

    world = _world(**layout)
    batch = Batch.from_token_ids(models.random_tokens())
    results = {}
    for folder, lora in folders.items():
        settings = {"lora": lora, "micro_batch_tokens": 48, "megatron": megatron}
        recipe = _fp32_recipe(world.layout, **settings, **_sharding(layout))
        learner = Learner(recipe, Path(folder), world)
        fresh = dict(learner.model.gather(torch.Tensor.clone, torch.float32))
        learner.model.set_adapters(models.lively_adapter)
        learner.reset_optimizer(recipe.learner.optimizer, 10)
        learner.save_adapter(Path(folder) / f"adapter-{world.size}", folder)
        learner.save(Path(folder) / "merged", Path(folder))
        frozen = [p.parameter.clone() for chunk in learner.model.frozen for p in chunk]
        exported = {name: tensor.clone() for name, tensor in learner.export()}
        scored = learner.score(batch).pi_logprobs
        outcome, loss = learner.supervised_step(_my_share(batch, world))
        gradients = {}
        if not layout.get("distributed_optimizer"):
            gradients = dict(learner.model.gather(lambda p: p.main_grad, torch.float32))
        learnt = {n: t.clone() for n, t in learner.model.gather(torch.Tensor.detach, torch.float32)}
        file = Path(folder) / f"lora-{world.rank}.pt"
        tensors = {"fresh": fresh, "exported": exported, "gradients": gradients, "learnt": learnt}
        torch.save({**tensors, "logprobs": scored}, file)
        after = [p.parameter for chunk in learner.model.frozen for p in chunk]
        results[folder] = {
            "loss": loss,
            "grad_norm": outcome.grad_norm,
            "frozen": all(map(torch.equal, frozen, after)),
            "shards": _shards(learner),
            "file": str(file),
        }
    return results


def lora_run(folder: str, lora: dict) -> list[str]:
    """A whole fp32 run with a warm start and adapters, from samples that are in its folder.

    Returns what its watchdog heard.
    """
    from megatron_fp16rl.train import train

    settings = {"ranks": 2, "tensor_parallel": 2, "global_batch_size": 8, "lora": lora}
    recipe = models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5, "replay": f"{folder}/rollouts"},
        learner={**settings, "optimizer": {"lr": 1e-2}},
        precision={"dtype": "fp32"},
        warm_start={"accuracy": 0.0, "check_every": 2, "global_batch_size": 8},
        trainer={"steps": 2},
    )
    heard: list[str] = []
    train(recipe, Path(folder), Path(folder), heard.append)
    return heard


def replay(folders: list[str], layout: dict, megatron: dict) -> dict:
    """A learner's step without replay, and replaying each choice in its folder's experts.pt."""
    import torch

    from megatron_fp16rl.learner import Learner

    world = _world(**layout)
    batch = Batch.from_token_ids(models.random_tokens())
    results = {}
    for folder in folders:
        recipe = _fp32_recipe(world.layout, micro_batch_tokens=34, megatron=megatron)
        learner = Learner(_with_replay(recipe), Path(folder), world)
        choices = {"none": None, **torch.load(Path(folder) / "experts.pt")}
        for name, experts in choices.items():
            learner.load(Path(folder))
            replayed = batch.replace(experts=experts)
            logprobs = learner.score(replayed).pi_logprobs
            agreement = learner.replay.agreement()
            outcome, loss = learner.supervised_step(_my_share(replayed, world))
            gradients = dict(learner.model.gather(lambda p: p.main_grad, torch.float32))
            file = Path(folder) / f"replay-{name}-{world.rank}.pt"
            torch.save({"logprobs": logprobs, "gradients": gradients}, file)
            results[f"{folder} {name}"] = {
                "agreement": agreement,
                "loss": loss,
                "grad_norm": outcome.grad_norm,
                "file": str(file),
            }
    return results


def replay_samples(folder: str, samples: str) -> list:
    """Mean |dlogp| and agreement with a server's samples, of a learner with replay and without.

    In bf16, for the server in fp16 and the tiny model differ in their choices too seldom.
    """
    import torch

    from megatron_fp16rl import mismatch
    from megatron_fp16rl.learner import Learner

    recipe = _with_replay(models.recipe(rollout=_rollout(), precision={"dtype": "bf16"}))
    learner = Learner(recipe, Path(folder), _world())
    batch = torch.load(samples, weights_only=False)
    rows = []
    for experts in (batch.experts, None):
        scored = learner.score(batch.replace(experts=experts))
        rows.append(
            [mismatch.measure(scored)["mismatch/logprob_abs_mean"], learner.replay.agreement()]
        )
    return rows


def without_patch(patch: str, folder: str, layout: dict) -> str:
    """One step of the learner without one of the repairs of Megatron-core."""
    from megatron_fp16rl.platform import cpu

    cpu.MEGATRON_PATCHES = [p for p in cpu.MEGATRON_PATCHES if p.name != patch]
    world = _world(**layout)
    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.platform import local_mla

    if patch == "latent-widths":
        local_mla.LatentDotProductAttention = local_mla.DotProductAttention
    settings = {**world.layout.model_dump(), "global_batch_size": 4, "micro_batch_tokens": 48}
    learner = Learner(models.recipe(learner=settings, rollout=_rollout()), Path(folder), world)
    batch = Batch.from_token_ids(models.random_tokens())
    return str(learner.supervised_step(_my_share(batch, world)))


def stock_latent_attention(folder: str, layout: dict) -> list[float]:
    """The gradient of the shared key's projection, from Megatron's layers and from ours.

    Returns how far they are apart, relative to ours: latent rows, rows of the shared key.
    """
    import dataclasses

    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.weights import families
    from megatron_fp16rl.weights.layouts import Cut

    world = _world(**layout)
    from megatron_fp16rl.platform import local_mla

    def gradient() -> torch.Tensor:
        learner = Learner(_fp32_recipe(world.layout), Path(folder), world)
        learner.supervised_step(_my_share(Batch.from_token_ids(models.random_tokens()), world))
        gradients = dict(learner.model.gather(lambda p: p.main_grad, torch.float32))
        return gradients.get("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", torch.zeros(40))

    ours = gradient()
    family = families.FAMILIES["deepseek_v3"]
    rules = tuple(
        dataclasses.replace(r, layout=Cut(0)) if "_down_proj" in r.megatron else r
        for r in family.rules
    )
    families.FAMILIES["deepseek_v3"] = dataclasses.replace(family, rules=rules)
    local_mla.LatentSelfAttention = local_mla.MLASelfAttention
    apart = gradient() - ours
    rank = models.DEEPSEEK_V3["kv_lora_rank"]
    parts = (apart[:rank], ours[:rank]), (apart[rank:], ours[rank:])
    return [(difference.norm() / whole.norm()).item() for difference, whole in parts]


def load_errors(folders: list[str]) -> list[str]:
    """What a learner in fp16 says of folders that it must refuse."""
    from megatron_fp16rl.learner import Learner

    world = _world()
    said = []
    for folder in folders:
        try:
            Learner(models.recipe(), Path(folder), world)
            said.append("loaded without a word")
        except (KeyError, ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def logprobs(vocabulary: int, temperature: float) -> dict:
    """token_logprobs and its gradient on cut, padded logits, against torch on whole ones in fp64."""
    import torch

    from megatron_fp16rl.learner import logprobs as module

    size = int(os.environ["WORLD_SIZE"])
    world = _world(tensor_parallel=size)
    padded = -(-vocabulary // size) * size
    generator = torch.Generator().manual_seed(5)
    whole = 4 * torch.randn(50, padded, generator=generator)
    targets = torch.randint(0, vocabulary, (50,), generator=generator)
    weights = torch.randn(50, generator=generator)
    reference = whole.double().requires_grad_()
    scaled = reference[:, :vocabulary] / temperature
    expected = scaled.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    columns = slice(world.rank * padded // size, (world.rank + 1) * padded // size)
    errors = []
    for chunk in (1 << 24, 100):  # in one piece, and a few rows at a time
        module._CHUNK_ELEMENTS = chunk
        mine = whole[:, columns].clone().requires_grad_()
        ours = module.token_logprobs(mine, targets, vocabulary, world.tensor.group, temperature)
        (ours * weights).sum().backward()
        errors.append((ours - expected).abs().max().item())
        errors.append((mine.grad - reference.grad[:, columns]).abs().max().item())
    half = whole[:, columns].half().requires_grad_()
    ours = module.token_logprobs(half, targets, vocabulary, world.tensor.group, temperature)
    ours.sum().backward()
    return {"errors": errors, "dtypes": [str(ours.dtype), str(half.grad.dtype)]}


def precision(layout: dict) -> dict:
    """Loss, gradient norm and weights after a step: fp32, and fp16 at several loss scales."""
    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.weights.build import model_folder

    world = _world(**layout)
    mine = _my_share(_answered(), world)
    results = {}
    for dtype, scale in (("fp32", 1.0), ("fp16", 1.0), ("fp16", 2.0**15), ("fp16", 2.0**8)):
        recipe = models.recipe(
            rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
            learner={
                **layout,
                "ranks": world.size,
                "global_batch_size": 16,
                "optimizer": {"lr": 1e-3},
            },
            precision={"dtype": dtype, "loss_scale": {"initial": scale}},
        )
        learner = Learner(recipe, model_folder(recipe.model), world)
        outcome, loss = learner.supervised_step(mine)
        weights = _export_all(learner)
        results[f"{dtype} {scale:g}"] = {
            "stepped": outcome.stepped,
            "loss": loss,
            "grad_norm": outcome.grad_norm,
            "weights": weights.tolist(),
            "shards": _shards(learner),
        }
    return results


def overflow(layout: dict, kinds: list[str], family: str, lora: dict | None = None) -> dict:
    """Infinite gradients on one rank alone, in the middle of a run; the same run without.

    kinds: of the parameters; for each, the last rank that has one is hit. With and without the
    distributed optimizer.
    """
    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.learner.faults import TooManySkips
    from megatron_fp16rl.recipe import BuildModel, Model
    from megatron_fp16rl.weights.build import model_folder

    world = _world(**layout)
    mine = _my_share(_answered(), world)
    config = {**models.FAMILIES, **models.MOE_FAMILIES}[family]

    def run(sharded: bool, kind: str, poisoned: set[int], updates: int) -> dict:
        recipe = models.recipe(
            model=Model(build=BuildModel(config=config, alphabet=models.ALPHABET)),
            rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
            learner={
                **layout,
                "ranks": world.size,
                "distributed_optimizer": sharded,
                "lora": lora,
                "global_batch_size": 16,
                "optimizer": {"lr": 1e-3, "warmup_updates": 2, "decay": "linear"},
            },
            trainer={"steps": 10},
            precision={"loss_scale": {"initial": 1024, "window": 3, "max_skips": 3}},
        )
        learner = Learner(recipe, model_folder(recipe.model), world)
        owned = learner.optimizer._places  # under the distributed optimizer: not all
        pieces = [p for chunk in learner.model.trained for p in chunk if p.kind == kind]
        pieces = [p for p in pieces if id(p.parameter) in owned]
        holders: list[bool | None] = [None] * world.size
        torch.distributed.all_gather_object(holders, bool(pieces))
        victim = max(rank for rank, holds in enumerate(holders) if holds)
        scaler, log = learner.scaler, []
        main_gradients, weights = learner.optimizer._main_gradients, None
        for update in range(updates):

            def poison_first(update: int = update) -> list:
                if update in poisoned and world.rank == victim:
                    pieces[-1].parameter.main_grad.fill_(torch.inf)
                return main_gradients()

            learner.optimizer._main_gradients = poison_first
            outcome, _ = learner.supervised_step(mine)
            after = _export_all(learner)
            log.append(
                {
                    "stepped": outcome.stepped,
                    "lr": outcome.lr,
                    "scale": scaler.scale.item(),
                    "skipped": [scaler.skipped_total, scaler.skipped_in_a_row],
                    "source": outcome.overflow_source,
                    "changed": weights is None or not torch.equal(after, weights),
                }
            )
            weights = after
        return {
            "log": log,
            "weights": weights.tolist(),
            "shards": _shards(learner),
            "victim": victim,
        }

    try:
        run(False, kinds[0], {0, 1, 2, 3}, 4)
        stopped = "went on"
    except TooManySkips as error:
        stopped = str(error)
    results = {"stopped": stopped}
    for sharded in (False, True):
        without = run(sharded, kinds[0], set(), 5)["weights"]
        for kind in kinds:
            result = run(sharded, kind, {2}, 6)
            results[f"{kind} {sharded}"] = {**result, "kind": kind, "without": without}
    return results


def fifty_updates(scales: list[float]) -> dict:
    """Losses of 50 good updates on one batch: fp32, and fp16 from several initial loss scales."""
    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.weights.build import model_folder

    world, batch, results = _world(), _answered(), {}
    for dtype, scale in (("fp32", 1.0), *(("fp16", scale) for scale in scales)):
        recipe = models.recipe(
            learner={"global_batch_size": 16, "optimizer": {"lr": 1e-3}},
            rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
            precision={
                "dtype": dtype,
                "loss_scale": {"initial": scale, "minimum": min(scale, 1.0), "window": 10},
            },
        )
        learner, losses, skipped = Learner(recipe, model_folder(recipe.model), world), [], 0
        while len(losses) < 50:
            outcome, loss = learner.supervised_step(batch)
            losses += [loss] if outcome.stepped else []
            skipped += not outcome.stepped
        results[f"{dtype} {scale:g}"] = {"losses": losses, "skipped": skipped}
    return results


def vanishing(
    layout: dict, exponents: list[int], family: str = "qwen3-moe", lora: dict | None = None
) -> dict:
    """The share of one update's gradients that vanish, at scales of 2^exponents.

    found: as the learner says; expected: as the sizes of the gradients in fp32 say, but for those of
    embeddings and of what has none.
    """
    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.recipe import BuildModel, Model
    from megatron_fp16rl.weights.build import model_folder

    world = _world(**layout)
    mine = _my_share(_answered(), world)
    config = {**models.FAMILIES, **models.MOE_FAMILIES}[family]

    def update(dtype: str, scale: float) -> tuple:
        recipe = models.recipe(
            model=Model(build=BuildModel(config=config, alphabet=models.ALPHABET)),
            rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
            learner={
                **layout,
                "ranks": world.size,
                "lora": lora,
                "global_batch_size": 16,
                "optimizer": {"clip_grad": 1e9},
            },
            precision={"dtype": dtype, "loss_scale": {"initial": scale, "minimum": scale}},
        )
        learner = Learner(recipe, model_folder(recipe.model), world)
        outcome, _ = learner.supervised_step(mine)
        return learner.model, outcome

    model, _ = update("fp32", 1.0)
    sizes = [
        piece.parameter.main_grad.flatten().abs()
        for piece in itertools.chain(*model.trained)
        if not piece.name.startswith(("embedding.", "output_layer."))
    ]
    exact = torch.cat([size for size in sizes if size.any()])
    return {
        "found": [update("fp16", 2.0**e)[1].underflow_fraction for e in exponents],
        "expected": [(exact <= 2.0 ** (-25 - e)).double().mean().item() for e in exponents],
    }


def resume(
    folder: str,
    layout: dict,
    family: str,
    before: int,
    after: int,
    lora: dict | None = None,
    seed: int = 0,
) -> dict:
    """Updates, one of them skipped, a checkpoint, more; begun at the checkpoint if there is one."""
    import torch

    from megatron_fp16rl.checkpoints import CheckpointError, available
    from megatron_fp16rl.learner import Learner, checkpoint
    from megatron_fp16rl.recipe import BuildModel, Model
    from megatron_fp16rl.weights.build import model_folder

    world = _world(**layout)
    config = {**models.FAMILIES, **models.DEEP, **models.MOE_FAMILIES}[family]
    recipe = models.recipe(
        model=Model(build=BuildModel(config=config, alphabet=models.ALPHABET, seed=seed)),
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
        learner={
            **layout,
            "ranks": world.size,
            "lora": lora,
            "global_batch_size": 16,
            "optimizer": {"lr": 1e-3, "warmup_updates": 4, "decay": "linear"},
            "megatron": {
                "moe_router_bias_update_rate": 1e-4
            },  # a buffer that moves, where there is one
        },
        trainer={"steps": 10},
        precision={"loss_scale": {"initial": 1024, "window": 3}},
    )
    like = model_folder(recipe.model)
    learner = Learner(recipe, like, world)
    root, mine, log = Path(folder), _my_share(_answered(), world), []

    def updates(count: int) -> None:
        for _ in range(count):
            outcome, loss = learner.supervised_step(mine)
            log.append([loss, outcome.stepped, outcome.grad_norm, outcome.lr])

    found, progress = available(root), None
    if found:
        try:
            progress = checkpoint.load(learner, found[0]).__dict__
        except CheckpointError as error:
            return {"refused": str(error)}
    else:
        updates(1)
        main_gradients = learner.optimizer._main_gradients
        learner.optimizer._main_gradients = lambda: [g.fill_(torch.inf) for g in main_gradients()]
        updates(1)
        learner.optimizer._main_gradients = main_gradients
        updates(before - 2)
        log.clear()
        checkpoint.save(learner, root, checkpoint.Progress(before, before, 7, 0.25), like)
    at_checkpoint, state = _export_all(learner).tolist(), learner.scaler.state_dict()
    updates(after)
    return {
        "progress": progress,
        "at_checkpoint": [at_checkpoint, state],
        "log": log,
        "shards": _shards(learner),
        "weights": _export_all(learner).tolist(),
        "scaler": learner.scaler.state_dict(),
    }


def to_hugging_face(checkpoint: str, folder: str) -> None:
    """Converts a checkpoint."""
    from megatron_fp16rl import convert

    convert.to_hugging_face(Path(checkpoint), Path(folder))


def micro_batches(budgets: list[int]) -> dict:
    """Loss, gradient norm and gradients of one fp32 update, for several token budgets."""
    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.weights.build import model_folder

    world = _world()
    batch = Batch.from_token_ids(models.random_tokens(14, (5, 19, 12, 31, 7, 31, 22, 9)))
    mine = _my_share(batch, world)
    results = {}
    for budget in budgets:
        recipe = _fp32_recipe(world.layout, micro_batch_tokens=budget, global_batch_size=8)
        learner = Learner(recipe, model_folder(recipe.model), world)
        count = len(learner._micro_batches(mine))
        outcome, loss = learner.supervised_step(mine)
        gradients = torch.cat([p.parameter.main_grad.flatten() for p in learner.model.pieces[0]])
        results[str(budget)] = [count, loss, outcome.grad_norm, gradients.tolist()]
    return results


def updates() -> dict:
    """A step of several fp32 updates on sequences of very unequal length, sorted by length."""
    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.weights.build import model_folder

    world = _world()
    lengths = sorted([4, 5, 6, 7, 8, 9, 30, 33, 36, 40, 41, 42, 3, 12, 19, 25])
    batch = Batch.from_token_ids(models.random_tokens(14, tuple(lengths)))
    generator = torch.Generator().manual_seed(1)
    batch = batch.replace(
        advantages=torch.randn(len(batch), 1, generator=generator) * batch.mask,
        mu_logprobs=-2.6 * batch.mask.float(),
        pi_logprobs=-2.6 * batch.mask.float(),
    )
    recipe = _fp32_recipe(world.layout, micro_batch_tokens=80, global_batch_size=8)
    learner = Learner(recipe, model_folder(recipe.model), world)
    train_step, tokens = learner.train_step, []

    def counted(part: Batch, *rest: object) -> object:
        tokens.append(int(part.lengths.sum()))
        return train_step(part, *rest)

    learner.train_step = counted
    metrics = learner.update(_my_share(batch, world), 0).metrics
    return {"metrics": metrics, "weights": _export_all(learner).tolist(), "tokens": tokens}


def reference(layout: dict, lora: dict | None = None) -> dict:
    """Log-probs of learner and reference, before and after updates; the weights around a score."""
    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.weights.build import model_folder

    world = _world(**layout)
    recipe = models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
        learner={
            **layout,
            "ranks": world.size,
            "lora": lora,
            "global_batch_size": 16,
            "optimizer": {"lr": 1e-3},
        },
    )
    learner = Learner(recipe, model_folder(recipe.model), world)
    learner.keep_reference()
    mine = _my_share(_answered(), world)
    first = learner.score(mine)
    for _ in range(3):
        learner.supervised_step(mine)
    weights = _shards(learner)
    then = learner.score(mine)
    return {
        "same_at_first": torch.equal(first.reference_logprobs, first.pi_logprobs),
        "same_reference": torch.equal(then.reference_logprobs, first.pi_logprobs),
        "moved": (then.pi_logprobs - first.pi_logprobs).abs().max().item(),
        "weights_kept": weights == _shards(learner),
        "not_for_checks": learner.score(mine, 1.0).reference_logprobs is None,
    }


def forward_fault() -> dict:
    """What a learner says when its forward pass is not finite; the loss scale before and after.

    And of a weight that is in order in bf16, but not for a server in fp16.
    """
    import tempfile

    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.learner.faults import NonFiniteForward
    from megatron_fp16rl.learner.model import WeightRangeError
    from megatron_fp16rl.weights.build import model_folder

    world = _world()
    recipe = models.recipe()
    learner = Learner(recipe, model_folder(recipe.model), world)
    with torch.no_grad():
        learner.model.cores[0].decoder.final_layernorm.weight[0] = torch.inf
    said = {}
    for name, action in (
        ("train", lambda: learner.supervised_step(_answered())),
        ("score", lambda: learner.score(_answered())),
        ("export", lambda: list(learner.export())),
    ):
        try:
            action()
            said[name] = "nothing"
        except (NonFiniteForward, WeightRangeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    mixed = Learner(
        models.recipe(precision={"dtype": "bf16", "rollout": "fp16"}), learner.folder, world
    )
    with torch.no_grad():
        mixed.model.cores[0].decoder.final_layernorm.weight[0] = -70_000
    mixed.save(Path(tempfile.mkdtemp()) / "bf16", mixed.folder)  # as bf16 it is in order
    try:
        list(mixed.export())
    except WeightRangeError as error:
        said["beyond"] = str(error)
    return {"said": said, "scale": learner.scaler.scale.item()}


def faults(layout: dict, family: str, cases: dict[str, dict], lora: dict | None = None) -> dict:
    """What is said and kept of faults; see _breaking and _acting for the keys of a case."""
    import tempfile

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.learner.faults import NonFinite
    from megatron_fp16rl.recipe import BuildModel, Model
    from megatron_fp16rl.weights.build import model_folder

    world = _world(**layout)
    config = {**models.FAMILIES, **models.MOE_FAMILIES}[family]
    recipe = models.recipe(
        model=Model(build=BuildModel(config=config, alphabet=models.ALPHABET)),
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
        learner={
            **layout,
            "ranks": world.size,
            "global_batch_size": 16,
            "micro_batch_tokens": 40,  # four sequences
            "lora": lora,
        },
        precision={"loss_scale": {"max_skips": 2}},
    )
    folder = model_folder(recipe.model)
    learner = Learner(recipe, folder, world)
    results = {}
    for name, case in cases.items():
        learner.load(folder)
        learner.faults.step = 7
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
        modules = [m for core in learner.model.cores for m in core.modules()]
        result["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        results[name] = result
    return results


def magnitudes(folder: str, scale: float, sequences: list[list[int]]) -> dict:
    """What is said of an update in which all is finite, and the largest magnitudes of each layer."""
    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.learner.forensics import watch

    world = _world()
    settings = {"global_batch_size": 4}
    recipe = models.recipe(
        learner=settings, rollout=_rollout(), precision={"loss_scale": {"initial": scale}}
    )
    learner = Learner(recipe, Path(folder), world)
    batch = Batch.from_token_ids(sequences)

    def rerun() -> None:
        learner.supervised_step(batch)

    report = watch(learner.model, rerun)
    return {"said": str(report.born), "layers": report.layers}


def compare_layers(folder: str, served: dict[str, list[str]], sequences: list[list[int]]) -> dict:
    """Hidden states in fp32, kept in a file; and what is found against states that were served."""
    from safetensors.torch import load_file, save_file

    from megatron_fp16rl.learner.model import Model
    from megatron_fp16rl.study.layers import Comparison, first_jump, learnt_states
    from megatron_fp16rl.weights.families import describe, load_config
    from megatron_fp16rl.weights.folder import HFFolder

    world = _world()
    model = {}
    for dtype in ("fp32", "fp16"):
        model[dtype] = Model(describe(load_config(Path(folder)), world.layout), dtype, world)
        model[dtype].load(HFFolder(folder))
    reference = [learnt_states(model["fp32"], ids) for ids in sequences]
    result = {"file": f"{next(iter(served.values()))[0]}.learnt"}
    save_file({k: v.contiguous() for k, v in reference[0].items()}, result["file"])
    for name, files in served.items():
        found = Comparison(model["fp16"].config.num_layers, "fp16")
        for file, ids, states in zip(files, sequences, reference, strict=True):
            found.add(load_file(file), learnt_states(model["fp16"], ids), states)
        rows = found.rows()
        result[name] = {"rows": rows, "first_jump": first_jump(rows), "tokens": found.tokens}
    return result


def keep_worst(folder: str, tokenizer: str) -> list[dict]:
    """Two steps of a run whose sequences' log ratios are known; then step 1 once more."""
    import torch
    from transformers import AutoTokenizer

    from megatron_fp16rl.worst import Worst

    world = _world()
    words = AutoTokenizer.from_pretrained(tokenizer)
    ratios = {0: [0.5, -3.0, 0.1, 2.0], 1: [-0.2, 0.3, 4.0, 0.4], 2: [0.0, 0.0, 0.0, 1.0]}

    def keep(worst: Worst, step: int, ratios: list[float]) -> None:
        batch = Batch.from_token_ids(models.random_tokens(14, (6,) * 4))
        pi = torch.zeros_like(batch.mu_logprobs)
        pi[:, 2] = torch.tensor(ratios)
        pi[:, 1] = 9.0  # no response token
        mask = batch.mask.clone()
        mask[:, 1] = False
        worst.keep(_my_share(batch.replace(pi_logprobs=pi, mask=mask), world), step)

    worst = Worst(Path(folder), world, words, first_step=0, count=3)
    for step in (0, 1, 2):
        keep(worst, step, ratios[step])
    resumed = Worst(Path(folder), world, words, first_step=1, count=3)
    kept = list(resumed.rows)
    keep(resumed, 1, [0.0, 0.0, 1.5, 0.0])
    return [
        [[row["step"], row["log_ratio"]] for row in rows]
        for rows in (worst.rows, kept, resumed.rows)
    ]


def _breaking(learner: object, case: dict) -> None:
    """multiply: parameters, by what; poison: a parameter and the rank of its shard; scale: of loss.

    fill_adapters: with something other than zero.
    """
    import torch

    chunks = learner.model.pieces + learner.model.adapters
    pieces = {piece.name: piece for chunk in chunks for piece in chunk}
    if "fill_adapters" in case:
        learner.model.set_adapters(models.lively_adapter)
    with torch.no_grad():
        for name, factor in case.get("multiply", {}).items():
            if name in pieces:
                pieces[name].parameter.mul_(factor)
        name, rank = case.get("poison", ("", -1))
        if learner.world.rank == rank:
            pieces[name].parameter.view(-1)[0] = torch.nan
    learner.scaler.scale.fill_(case.get("scale", 2.0**15))
    finalize = learner.model.config.finalize_model_grads_func

    def overflow_in_reduction(*args: object, **options: object) -> None:
        finalize(*args, **options)
        pieces[next(iter(pieces))].parameter.main_grad.fill_(torch.inf)

    if "reduction" in case:
        learner.model.config.finalize_model_grads_func = overflow_in_reduction


def _acting(learner: object, case: dict) -> None:
    """do: update, score or prepare; loss: [group, factor] of one sample's; reward, mu: [row, value]."""
    import torch

    whole = _answered()
    groups = torch.arange(16)
    for name, tensor in (("reward", whole.rewards), ("mu", whole.mu_logprobs[:, 5])):
        for row, value in case.get(name, []):
            tensor[row] = float(value)
    if case["do"] == "prepare":
        groups //= 4
    batch = _my_share(whole.replace(groups=groups), learner.world)
    if case["do"] != "update":
        getattr(learner, case["do"])(batch)
        return

    def token_losses(logprobs: torch.Tensor, rows: Batch) -> tuple[torch.Tensor, dict]:
        group, factor = case.get("loss", (0, 1.0))
        factors = torch.where(rows.groups == group, float(factor), 1.0)
        return -logprobs * rows.mask * factors[:, None], {}

    for _ in range(2):  # max_skips
        learner.train_step(batch, token_losses, batch.mask.sum().float())


def distributed_sync(endpoint: dict, folder: str) -> dict:
    """Noisy weights in one bucket, the original ones in many; then an update the server refuses."""
    import time

    import torch

    from megatron_fp16rl.recipe import Sync
    from megatron_fp16rl.rollout.client import Client, Sampling, ServerError
    from megatron_fp16rl.rollout.server import Endpoint
    from megatron_fp16rl.weights import transport
    from megatron_fp16rl.weights.folder import HFFolder

    _world()
    client = Client(Endpoint(**endpoint), 60)
    original = HFFolder(folder)
    sender = transport.connect(
        Sync(timeout_s=60), 1, "127.0.0.1", Path(folder), Path(folder), "fp16"
    )
    prompts = [[2, 3, 12, 4, 5, 13], [9, 9, 12, 3, 2, 13]]
    result = {"sent": [], "versions": [], "scores": [], "buckets": []}
    send_bucket, buckets = sender._send_bucket, []

    def counted(bucket: list, version: str) -> None:
        buckets.append(version)
        send_bucket(bucket, version)

    sender._send_bucket = counted
    for version, limit, tensors in (
        ("21", 1 << 30, noisy(original)),
        ("22", 20_000, ((n, original.read(n)) for n in original.names())),
    ):
        sender.bucket_bytes = limit
        buckets.clear()
        result["sent"].append(sender.send(tensors, version, [client]))
        assert buckets == [f"{version}-partial"] * (len(buckets) - 1) + [version]
        result["buckets"].append(len(buckets))
        result["versions"].append(client.generate(prompts, Sampling(1))[0].version)
        result["scores"].append(client.score(prompts))
    began = time.monotonic()
    try:
        # Outside begin and end: the server answers at once and never joins the broadcast.
        send_bucket([("model.norm.weight", torch.ones(64).half())], "23")
        result["refused"] = "accepted"
    except ServerError as error:
        result["refused"] = str(error)
    result["refused_after_s"] = time.monotonic() - began
    return result


def interrupted_sync(endpoints: list[dict], victim: int, folder: str) -> dict[str, object]:
    """Noisy weights to two servers, one of which is stopped between two buckets."""
    import os
    import signal

    from megatron_fp16rl.recipe import Sync
    from megatron_fp16rl.rollout.client import Client, Sampling, ServerError
    from megatron_fp16rl.rollout.server import Endpoint
    from megatron_fp16rl.weights import transport
    from megatron_fp16rl.weights.folder import HFFolder

    _world()
    clients = [Client(Endpoint(**endpoint), 60) for endpoint in endpoints]
    sender = transport.connect(
        Sync(timeout_s=5), 1, "127.0.0.1", Path(folder), Path(folder), "fp16"
    )
    sender.bucket_bytes = 20_000
    original = HFFolder(folder)
    sender.send(((n, original.read(n)) for n in original.names()), "40", clients)
    send_bucket, sent = sender._send_bucket, []

    def interrupted(bucket: list, version: str) -> None:
        sent.append(version)
        if len(sent) == 3:
            os.killpg(victim, signal.SIGSTOP)
        send_bucket(bucket, version)

    sender._send_bucket = interrupted
    failed = ""
    try:
        sender.send(noisy(original), "41", clients)
    except (ServerError, transport.SyncFailed) as error:
        failed = str(error)
    survivors = sender.survivors(clients)
    prompts = [[2, 3, 12, 4, 5, 13], [9, 9, 12, 3, 2, 13]]
    between = survivors[0].generate(prompts, Sampling(1))[0].version
    sender.send(noisy(original), "41", survivors)
    interrupted_scores = survivors[0].score(prompts)
    sender.send(noisy(original), "42", survivors)  # undisturbed
    whole = survivors[0].score(prompts)
    sender.send(noisy(original), "41", survivors)
    pairs = [
        (a, b)
        for mine, other in zip(interrupted_scores, whole, strict=True)
        for a, b in zip(mine, other, strict=True)
    ]
    return {
        "failed": failed,
        "survivors": [client.url for client in survivors],
        "version_between": between,
        "version": survivors[0].generate(prompts, Sampling(1))[0].version,
        "apart": max(abs(a - b) for a, b in pairs),
    }


def pool_faults(endpoints: list[dict], victim: int, folder: str, announced: str) -> dict:
    """Two leaders and two servers, one of which is stopped in, or just before, an update.

    Then one leader loses all of its servers in mid-collection, once; and then again and again.
    """
    import signal
    import time

    import torch
    import torch.distributed as dist
    from transformers import AutoTokenizer

    from megatron_fp16rl.rollout.client import Sampling
    from megatron_fp16rl.rollout.rollouts import Rollouts, ServersGone
    from megatron_fp16rl.rollout.server import Endpoint, announce
    from megatron_fp16rl.tasks import make
    from megatron_fp16rl.weights.folder import HFFolder

    world, here = _world(ranks=2), Path(announced)
    recipe = models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5, "servers": 2},
        learner={"ranks": 2, "global_batch_size": 8},
        sync={"timeout_s": 4},
    )
    if world.is_first:
        for index, endpoint in enumerate(endpoints):
            announce(here, index, Endpoint(**endpoint))
    task = make(recipe.task, AutoTokenizer.from_pretrained(folder), seed=0)
    rollouts = Rollouts(recipe, task, world, here, Path(folder), here)
    original, sender = HFFolder(folder), rollouts.transport

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        for name in original.names():
            dist.all_reduce(torch.zeros(1))  # like a learner's gathers: every rank, or none
            yield name, original.read(name)

    def publish() -> list[str]:
        rollouts.publish(export, (rollouts.version or 0) + 1)
        return served()

    def served() -> list[str]:
        clients = rollouts.pool.clients
        for client in clients:
            (answer,) = client.generate([[2, 3]], Sampling(1))
            assert answer.version == str(rollouts.version), client.url
        dist.barrier()
        return [client.url for client in clients]

    def awake() -> list[str]:
        if world.is_first:
            os.killpg(victim, signal.SIGCONT)
        dist.barrier()
        for _ in range(5):  # on a busy machine one may be late, and wait for the next
            if len(found := publish()) == 2:
                break
            time.sleep(1)
        return found

    def stopping(method: Callable, at: int) -> Callable:
        calls = []

        def call(*arguments: object) -> None:
            calls.append(arguments)
            if len(calls) == at:
                os.killpg(victim, signal.SIGSTOP)
            method(*arguments)

        return call

    result = {"both": awake()}
    if world.is_first:
        sender.bucket_bytes = 20_000
        sender._send_bucket = stopping(sender._send_bucket, 3)
    result["stopped in an update"] = publish()
    result["awake"] = awake()
    if world.is_first:
        sender._leave()
        sender._regroup = stopping(sender._regroup, 1)
    result["stopped before the group was made"] = publish()
    result["awake again"] = awake()

    join, asked = rollouts.pool.join, []

    def losing(times: int) -> None:
        def call(found: list) -> None:
            join(found)
            asked.append(found)
            if world.rank == 1 and len(asked) <= times:
                for client in rollouts.pool.clients:
                    client._http.base_url = "http://127.0.0.1:1"  # where nobody listens

        asked.clear()
        rollouts.pool.clients = []
        rollouts.pool.join = call
        call(rollouts._members)

    losing(1)
    result["groups"] = rollouts.collect(0).groups.tolist()
    result["resent"] = rollouts.counts["rollout/resent_requests"]
    result["one leader had none"] = served()
    losing(100)
    try:
        rollouts.collect(1)
    except ServersGone as error:
        result["hopeless"] = str(error)
    return result


def expert_bias(folder: str, layout: dict, rates: list[float]) -> list[dict]:
    """What fp16 learners export before and after an update that moves the expert bias by a rate."""
    import torch

    from megatron_fp16rl.learner import Learner

    world = _world(**layout)
    results = []
    for rate in rates:
        recipe = _fp16_recipe(world.layout, moe_router_bias_update_rate=rate)
        learner = Learner(recipe, folder, world)
        before = {name: tensor.clone() for name, tensor in learner.export()}
        outcome, _ = learner.supervised_step(Batch.from_token_ids(models.random_tokens()))
        file = Path(folder) / f"exported-{rate}-{world.rank}.pt"
        torch.save((before, dict(learner.export())), file)
        results.append({"stepped": outcome.stepped, "file": str(file)})
    return results


def serve_learnt(endpoint: dict, folder: str, layout: dict, sequences: list[list[int]]) -> list:
    """Sends a learner's weights to a server, in tiny buckets; returns the learner's log-probs."""
    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.recipe import Sync
    from megatron_fp16rl.rollout.client import Client
    from megatron_fp16rl.rollout.server import Endpoint
    from megatron_fp16rl.weights import transport

    world = _world(**layout)
    learner = Learner(_fp16_recipe(world.layout), folder, world)
    tensors = learner.export()
    if world.is_first:
        sender = transport.connect(
            Sync(timeout_s=60), 1, "127.0.0.1", Path(folder), Path(folder), "fp16"
        )
        sender.bucket_bytes = 1_000  # nearly every tensor in a bucket of its own
        sender.send(tensors, "31", [Client(Endpoint(**endpoint), 60)])
    else:
        assert list(tensors) == []
    scores = learner.score(Batch.from_token_ids(sequences)).pi_logprobs
    return [row[1 : len(ids)].tolist() for row, ids in zip(scores, sequences, strict=True)]


def export_memory(layout: dict, family: str, bucket: int) -> dict:
    """The most bytes that were alive at once while weights were put into buckets and dropped.

    Counted tensor by tensor, beside what was there before.
    """
    from itertools import chain

    import torch

    from megatron_fp16rl.learner import Learner
    from megatron_fp16rl.recipe import BuildModel, Model
    from megatron_fp16rl.weights.build import model_folder
    from megatron_fp16rl.weights.transport import _buckets

    world = _world(**layout)
    config = {**models.FAMILIES, **models.MOE_FAMILIES}[family]
    config = {**config, "num_hidden_layers": 8}
    recipe = models.recipe(
        model=Model(build=BuildModel(config=config, alphabet=models.ALPHABET)),
        learner={**world.layout.model_dump(), "global_batch_size": 4},
        rollout=_rollout(),
    )
    learner = Learner(recipe, model_folder(recipe.model), world)
    names = [name for name, _ in learner.export()]
    parameters = [
        piece.parameter.nbytes * learner.model._tensor_axis(piece).size
        for piece in chain(*learner.model.pieces)
    ]
    again, sizes = [], [0]
    with models.LiveBytes() as live:
        for bucket_of, _ in _buckets(learner.export(), bucket, torch.float16):
            if not bucket_of:
                break  # on ranks that only take part in the gathering
            flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket_of])
            again += [name for name, _ in bucket_of]
            sizes += [tensor.nbytes for _, tensor in bucket_of]
            del flat, bucket_of
    return {
        "same_order": names == again,
        "peak": live.peak,
        "left": live.now,
        "largest": max(parameters),
        "total": sum(sizes),
    }


def noisy(folder: object) -> object:
    """The weights of a folder, disturbed, in fp16."""
    import torch

    generator = torch.Generator().manual_seed(7)
    for name in folder.names():
        tensor = folder.read(name)
        yield name, (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).half()


def _answered() -> Batch:
    """Sixteen short sequences over the alphabet of the tiny recipe."""
    return Batch.from_token_ids(models.random_tokens(14, (10,) * 16))


def _world(**layout):
    """Joins the ranks of this test in a layout."""
    only = {k: v for k, v in layout.items() if k not in _sharding(layout)}
    return initialize(Layout(**{"ranks": int(os.environ["WORLD_SIZE"]), **only}), seed=0)


def _sharding(layout: dict) -> dict:
    """What of a test's layout is the optimizer's."""
    return {k: v for k, v in layout.items() if k == "distributed_optimizer"}


def _shards(learner: object) -> dict[str, str]:
    """A digest of each parameter shard of this rank; equal names must mean equal digests."""
    import hashlib
    from itertools import chain

    model, digests = learner.model, {}
    for piece in chain(*model.pieces, *model.adapters):
        bits = piece.parameter.detach().float().numpy().tobytes()
        digests[f"{model.whole_name(piece)} {model._tensor_axis(piece).rank}"] = hashlib.sha256(
            bits
        ).hexdigest()
    return digests


def _export_all(learner: object) -> object:
    """All exported weights in one vector, on every rank, in the order of their names."""
    import torch

    exported = {name: tensor.float().flatten() for name, tensor in learner.export()}
    exported = [exported[name] for name in sorted(exported)]
    return learner.world.from_first(torch.cat(exported) if exported else None)


def _my_share(batch: Batch, world: object) -> Batch:
    import torch

    share = len(batch) // world.data.size
    return batch.rows(torch.arange(share) + share * world.data.rank)


def _fp32_recipe(layout: Layout, **learner):
    settings = {
        **layout.model_dump(),
        "global_batch_size": 4,
        "optimizer": {"lr": 1e-3, "clip_grad": 1e9},
    }
    return models.recipe(
        learner={**settings, **learner}, precision={"dtype": "fp32"}, rollout=_rollout()
    )


def _with_replay(recipe):
    rollout = recipe.rollout.model_copy(update={"router_replay": True})
    return recipe.model_copy(update={"rollout": rollout})


def _fp16_recipe(layout: Layout, **megatron):
    return models.recipe(
        learner={**layout.model_dump(), "global_batch_size": 4, "megatron": megatron},
        rollout=_rollout(),
    )


def _rollout() -> dict:
    return {"prompts": 4, "samples": 2, "max_new_tokens": 5}


def graded_rollouts(endpoints: str, folder: str, problems: str, function: str) -> dict:
    """One step of a task whose function fails for some prompts; then with no error allowed."""
    from transformers import AutoTokenizer

    from megatron_fp16rl.rewards import RewardError
    from megatron_fp16rl.rollout.client import Sampling
    from megatron_fp16rl.rollout.rollouts import Rollouts
    from megatron_fp16rl.rollout.server import announced
    from megatron_fp16rl.tasks import make

    world = _world(ranks=2)
    reward = {"kind": "function", "path": function, "workers": 1, "max_error_fraction": 0.9}
    recipe = models.recipe(
        task={
            "kind": "dataset",
            "path": problems,
            "held_out": 0.0,
            "reward": reward,
            "template": "none",
            "instruction": "",
        },
        rollout={"prompts": 4, "samples": 8, "max_new_tokens": 9, "stop": [*"0123456789"]},
        learner={"ranks": 2, "global_batch_size": 8},
        sync={"transport": "disk"},
    )
    task = make(recipe.task, AutoTokenizer.from_pretrained(folder), seed=0)
    rollouts = Rollouts(recipe, task, world, Path(endpoints), Path(folder), Path(endpoints).parent)
    rollouts.pool.join(announced(Path(endpoints)))
    (now,) = rollouts.pool.clients[0].generate([[2, 3]], Sampling(1))
    rollouts.version = now.version  # other tests have left their own
    batch = rollouts.collect(0)
    faults = dict(rollouts.counts)
    task.max_error_fraction = 0.0
    raised = ""
    try:
        rollouts.collect(1)
    except RewardError as error:
        raised = str(error)
    return {
        "faults": faults,
        "raised": raised,
        "groups": batch.groups.tolist(),
        "whole": (~batch.truncated).tolist(),
        "rewards": batch.rewards.tolist(),
    }


def collective_payloads(size):
    """What each operation of `fp16rl bench collectives` brings; and what is said of one that lies."""
    import torch
    import torch.distributed as dist

    from megatron_fp16rl.bench import collectives
    from megatron_fp16rl.learner.world import Axis

    dist.init_process_group("gloo")
    axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)

    def transfer(operation, dtype):
        return collectives.transfer_of(operation, axis, size, dtype, torch.device("cpu"))

    results = {}
    for operation in collectives.OPERATIONS:
        for dtype in ("fp16", "bf16"):
            found = transfer(operation, dtype)
            case = collectives.Case("world", operation, dtype, axis.size, size)
            collectives.check(case, found)
            results[f"{operation} {dtype}"] = found.result.tolist()
    broken = transfer("all_reduce", "fp16")

    def lie():
        broken.result.copy_(broken.expected)
        broken.result[1] = 1

    try:
        wrong = collectives.Transfer(lie, broken.source, broken.result, broken.expected)
        collectives.check(case, wrong)
    except collectives.WrongPayload as error:
        return {"results": results, "complaint": str(error)}
