"""Held against Hugging Face: scores, gradients, exports; with adapters, and with replayed routers."""

import os
import tempfile
from pathlib import Path

import torch

from megatron_fp16rl.data.batch import Batch, compact
from megatron_fp16rl.data.micro_batches import in_rows
from megatron_fp16rl.recipe.learner import Padding
from tests import models
from tests.workers.common import (
    fp32_recipe,
    gradients_of,
    join_world,
    make_learner,
    my_share,
    sharding,
    shards_of,
    trained_of,
    with_replay,
)


def parity(folders: list[str], layout: dict) -> dict:
    """Log-probs, gradients and exported weights of models, to be compared with Hugging Face."""
    world = join_world(**layout)
    from megatron_fp16rl.learner.arrangement import arrange

    batch = Batch.from_token_ids(models.random_tokens())
    mine = my_share(batch, world)
    results = {}
    for folder in folders:
        recipe = fp32_recipe(world.layout, micro_batch_tokens=48, **sharding(layout))
        learner = make_learner(recipe, world, folder)
        model = learner.model
        exported = {name: tensor.clone() for name, tensor in learner.export()}
        logits = None
        if world.pipeline.size == world.context.size == 1:  # whole: gather this rank's columns
            (chunk,), count = model.chunks, len(batch)
            (whole,) = in_rows([list(range(count))], batch.lengths.tolist(), Padding(row=2), False)
            arrangement = arrange(whole, world.context)
            place = arrangement.place.flatten().clamp(min=0)
            logits = learner.forward.logits(batch, arrangement, place, chunk).detach()[0]
            columns = [torch.empty_like(logits) for _ in range(world.tensor.size)]
            torch.distributed.all_gather(columns, logits, group=world.tensor.group)
            logits = torch.cat(columns, -1)[..., : model.spec.shapes.vocabulary]
            logits = logits.view(*batch.tokens.shape, -1)
        scored = learner.score(batch).pi_logprobs
        outcome, loss = learner.supervised_update(mine)
        gradients = {}
        if not layout.get("distributed_optimizer"):
            gradients = gradients_of(model)
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
    world = join_world(**layout)
    batch = Batch.from_token_ids(models.random_tokens())
    results = {}
    for folder, lora in folders.items():
        settings = {"lora": lora, "micro_batch_tokens": 48, "megatron": megatron}
        recipe = fp32_recipe(world.layout, **settings, **sharding(layout))
        learner = make_learner(recipe, world, folder)
        fresh = trained_of(learner.model)
        learner.model.set_adapters(models.lively_adapter)
        learner.reset_optimizer(recipe.learner.optimizer, 10)
        learner.save_adapter(Path(folder) / f"adapter-{world.size}", folder)
        learner.save(Path(folder) / "merged", Path(folder))
        frozen = [p.parameter.clone() for p in learner.model.frozen]
        exported = {name: tensor.clone() for name, tensor in learner.export()}
        scored = learner.score(batch).pi_logprobs
        outcome, loss = learner.supervised_update(my_share(batch, world))
        gradients = {}
        if not layout.get("distributed_optimizer"):
            gradients = gradients_of(learner.model)
        learnt = trained_of(learner.model)
        file = Path(folder) / f"lora-{world.rank}.pt"
        tensors = {"fresh": fresh, "exported": exported, "gradients": gradients, "learnt": learnt}
        torch.save({**tensors, "logprobs": scored}, file)
        after = [p.parameter for p in learner.model.frozen]
        results[folder] = {
            "loss": loss,
            "grad_norm": outcome.grad_norm,
            "frozen": all(map(torch.equal, frozen, after)),
            "shards": shards_of(learner),
            "file": str(file),
        }
    return results


def lora_run(folder: str, lora: dict) -> list[str]:
    """A whole fp32 run with a warm start and adapters, from samples that are in its folder.

    Returns what its watchdog heard.
    """
    from megatron_fp16rl.train import train
    from megatron_fp16rl.utils.watchdog import Watchdog

    settings = {"ranks": 2, "tensor_parallel": 2, "global_batch_size": 8, "lora": lora}
    recipe = models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5, "replay": f"{folder}/rollouts"},
        learner={**settings, "optimizer": {"lr": 1e-2}},
        precision={"dtype": "fp32"},
        warm_start={"accuracy": 0.0, "check_every": 2, "global_batch_size": 8},
        trainer={"steps": 2},
    )
    heard: list[str] = []
    watchdog = Watchdog.idle()
    watchdog.beat = heard.append
    train(recipe, Path(folder), Path(folder), watchdog)
    return heard


def replay(folders: list[str], layout: dict, megatron: dict) -> dict:
    """A learner's step without replay, and replaying each choice in its folder's experts.pt."""
    world = join_world(**layout)
    batch = Batch.from_token_ids(models.random_tokens())
    results = {}
    for folder in folders:
        recipe = fp32_recipe(world.layout, micro_batch_tokens=34, megatron=megatron)
        learner = make_learner(with_replay(recipe), world, folder)
        choices = {"none": None, **torch.load(Path(folder) / "experts.pt")}
        for name, experts in choices.items():
            learner.load(Path(folder))
            replayed = batch.replace(experts=None if experts is None else compact(experts, 8))
            replayed = learner.share(replayed)
            logprobs = learner.score(replayed).pi_logprobs
            agreement = learner.router_replay.agreement()
            outcome, loss = learner.supervised_update(my_share(replayed, world))
            gradients = gradients_of(learner.model)
            file = Path(folder) / f"replay-{name}-{world.rank}.pt"
            torch.save({"logprobs": logprobs, "gradients": gradients}, file)
            results[f"{folder} {name}"] = {
                "agreement": agreement,
                "loss": loss,
                "grad_norm": outcome.grad_norm,
                "file": str(file),
            }
    return results


def logprobs(vocabulary: int, temperature: float) -> dict:
    """token_logprobs and its gradient on cut, padded logits, against torch on whole ones in fp64."""
    from megatron_fp16rl.learner import logprobs as module

    size = int(os.environ["WORLD_SIZE"])
    world = join_world(tensor_parallel=size)
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


def warm_start_that_fails() -> list[bool]:
    """Whether a warm start that cannot arrive says so, and whether that is final."""
    from launch.rank import _is_final
    from megatron_fp16rl.data.tasks import make
    from megatron_fp16rl.metrics.run import Run
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.models.tokenizer import load_tokenizer
    from megatron_fp16rl.recipe import RecipeError
    from megatron_fp16rl.warm_start import warm_start

    world = join_world()
    never = {"accuracy": 1.0, "max_updates": 1, "check_every": 1, "global_batch_size": 8}
    recipe = models.recipe(warm_start=never)
    like = model_folder(recipe.model)
    tokenizer = load_tokenizer(like)
    task = make(recipe.task, tokenizer, 0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, Path(folder), world)
        learner = make_learner(recipe, world, like)
        try:
            warm_start(recipe, learner, task, like, run, lambda what: None)
        except RecipeError as error:
            return ["warm_start.accuracy" in str(error), _is_final(error)]
    return []
