"""FP16 updates: overflows, loss scales, micro-batches, and what two runs agree about."""

from pathlib import Path
from typing import Any

import torch

from megatron_fp16rl.data.batch import Batch
from tests import models
from tests.workers.common import (
    answered,
    export_all,
    family_recipe,
    fp32_recipe,
    join_world,
    make_learner,
    my_share,
    shards_of,
)

DENSE = "qwen3-tied"


def precision(layout: dict, head: str | None = None) -> dict:
    """Loss, gradient norm and weights after a step: fp32, and fp16 at several loss scales."""

    world = join_world(**layout)
    mine = my_share(answered(), world)
    results = {}
    for dtype, scale in (("fp32", 1.0), ("fp16", 1.0), ("fp16", 2.0**15), ("fp16", 2.0**8)):
        recipe = family_recipe(
            *(DENSE, layout),
            learner={"optimizer": {"lr": 1e-3}},
            precision={"dtype": dtype, "head": head, "loss_scale": {"initial": scale}},
        )
        learner = make_learner(recipe, world)
        outcome, loss = learner.supervised_update(mine)
        weights = export_all(learner)
        results[f"{dtype} {scale:g}"] = {
            "stepped": outcome.stepped,
            "loss": loss,
            "grad_norm": outcome.grad_norm,
            "weights": weights.tolist(),
            "shards": shards_of(learner),
        }
    return results


def _poisoned(learner: Any, mine: Batch, kind: str, poisoned: set[int], updates: int) -> dict:
    """Updates from the initial weights; in those of `poisoned` one rank's gradient is infinite."""
    world = learner.world
    learner.load(learner.hf_dir)
    owned = learner.optimizer._slots  # under the distributed optimizer: not all
    shards = [p for p in learner.model.trained if p.kind == kind]
    shards = [p for p in shards if id(p.parameter) in owned]
    holders: list[bool | None] = [None] * world.size
    torch.distributed.all_gather_object(holders, bool(shards))
    victim = max(rank for rank, holds in enumerate(holders) if holds)
    scaler, log = learner.scaler, []
    main_gradients, before = learner.optimizer._main_gradients, None
    for update in range(updates):

        def poison_first(update: int = update) -> list:
            if update in poisoned and world.rank == victim:
                shards[-1].main_grad.fill_(torch.inf)
            return main_gradients()

        learner.optimizer._main_gradients = poison_first
        outcome, _ = learner.supervised_update(mine)
        after = shards_of(learner)
        log.append(
            {
                "stepped": outcome.stepped,
                "lr": outcome.lr,
                "scale": scaler.scale.item(),
                "skipped": [scaler.skipped_total, scaler.skipped_in_a_row],
                "source": outcome.overflow_source,
                "changed": after != before,
            }
        )
        before = after
    return {
        "log": log,
        "weights": export_all(learner).tolist(),
        "shards": after,
        "victim": victim,
    }


def overflow(layout: dict, kinds: list[str], family: str, lora: dict | None = None) -> dict:
    """Infinite gradients on one rank alone, in the middle of a run; the same run without.

    kinds: of the parameters; for each, the last rank that has one is hit. With and without the
    distributed optimizer.
    """
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.learner.nonfinite import TooManySkips

    world = join_world(**layout)
    mine = my_share(answered(), world)

    def new_learner(sharded: bool) -> Learner:
        optimizer = {"lr": 1e-3, "warmup_updates": 2, "decay": "linear"}
        recipe = family_recipe(
            *(family, layout, lora),
            learner={"distributed_optimizer": sharded, "optimizer": optimizer},
            trainer={"steps": 10},
            precision={"loss_scale": {"initial": 1024, "window": 2, "max_skips": 3}},
        )
        return make_learner(recipe, world)

    learner = new_learner(False)
    try:
        _poisoned(learner, mine, kinds[0], {0, 1, 2, 3}, 4)
        stopped = "went on"
    except TooManySkips as error:
        stopped = str(error)
    results = {"stopped": stopped}
    for sharded in (False, True):
        learner = new_learner(True) if sharded else learner
        without = _poisoned(learner, mine, kinds[0], set(), 3)["weights"]
        for kind in kinds:
            result = _poisoned(learner, mine, kind, {1}, 4)
            results[f"{kind} {sharded}"] = {**result, "kind": kind, "without": without}
    return results


def first_adam_step(eps: float, lr: float) -> dict:
    """How far the fp32 parameters move in a first fp16 step, by whether they have a gradient."""
    world = join_world()
    recipe = family_recipe(DENSE, {}, learner={"optimizer": {"lr": lr, "eps": eps}})
    learner = make_learner(recipe, world)

    places = list(learner.optimizer._slots.values())
    before = torch.cat([place.main.flatten().clone() for place in places])
    assert learner.supervised_update(answered())[0].stepped
    moved = (torch.cat([place.main.flatten() for place in places]) - before).abs()
    means = [place.adam.state[place.main]["exp_avg"].flatten() for place in places]
    gradient = torch.cat(means) / (1 - recipe.learner.optimizer.beta1)
    groups = [group for part in learner.optimizer.parts for group in part.optimizer.param_groups]
    return {
        "eps": sorted({group["eps"] for group in groups}),
        # An eps of 1e-8 would move these by 1 % less, or more than that.
        "small": int(((gradient != 0) & (gradient.abs() < 1e-6)).sum()),
        "with": [value.item() for value in moved[gradient != 0].aminmax()],
        "without": moved[gradient == 0].max().item() if (gradient == 0).any() else 0.0,
    }


def fifty_updates(scales: list[float]) -> dict:
    """Losses of 50 good updates on one batch: fp32, and fp16 from several initial loss scales."""

    world, batch, results = join_world(), answered(), {}
    for dtype, scale in (("fp32", 1.0), *(("fp16", scale) for scale in scales)):
        recipe = family_recipe(
            *(DENSE, {}),
            learner={"optimizer": {"lr": 1e-3}},
            precision={
                "dtype": dtype,
                "loss_scale": {"initial": scale, "minimum": min(scale, 1.0), "window": 10},
            },
        )
        learner, losses, skipped = make_learner(recipe, world), [], 0
        while len(losses) < 50:
            outcome, loss = learner.supervised_update(batch)
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
    world = join_world(**layout)
    mine = my_share(answered(), world)

    def update(dtype: str, scale: float) -> tuple:
        recipe = family_recipe(
            *(family, layout, lora),
            learner={"optimizer": {"clip_grad": 1e9}},
            precision={"dtype": dtype, "loss_scale": {"initial": scale, "minimum": scale}},
        )
        learner = make_learner(recipe, world)
        outcome, _ = learner.supervised_update(mine)
        return learner.model, outcome

    model, _ = update("fp32", 1.0)
    sizes = [
        shard.main_grad.flatten().abs()
        for shard in model.trained
        if not shard.name.startswith(("embedding.", "output_layer."))
    ]
    exact = torch.cat([size for size in sizes if size.any()])
    return {
        "found": [update("fp16", 2.0**e)[1].underflow_fraction for e in exponents],
        "expected": [(exact <= 2.0 ** (-25 - e)).double().mean().item() for e in exponents],
    }


def interleaved(folder: str, cases: list[dict]) -> list[dict]:
    """Tokens of the micro-batches of sequences of very unequal length, and their scores.

    cases: settings of `learner`.
    """
    batch = Batch.from_token_ids(models.random_tokens(14, (4,) * 20 + (30, 31, 29, 7)))
    world, results = join_world(pipeline_parallel=2, model_chunks=2), []
    for settings in cases:
        learner = make_learner(fp32_recipe(world.layout, **settings), world, folder)
        schedule, sizes = learner.forward.schedule, []

        def watched(schedule=schedule, sizes=sizes, **options: object) -> object:
            sizes.append(options["seq_length"] * options["micro_batch_size"])
            return schedule(**options)

        learner.forward.schedule = watched
        results.append({"scores": learner.score(batch).pi_logprobs.tolist(), "sizes": sizes})
    return results


def updates() -> dict:
    """A step of several fp32 updates on sequences of very unequal length, sorted by length."""
    world = join_world()
    lengths = sorted([4, 5, 6, 7, 8, 9, 30, 33, 36, 40, 41, 42, 3, 12, 19, 25])
    batch = Batch.from_token_ids(models.random_tokens(14, tuple(lengths)))
    generator = torch.Generator().manual_seed(1)
    batch = batch.replace(mu_logprobs=-2.6 * batch.mask.float())
    advantages = torch.randn(len(batch), 1, generator=generator) * batch.mask
    batch = batch.scored(batch.mu_logprobs).with_advantages(advantages)
    recipe = fp32_recipe(world.layout, micro_batch_tokens=80, global_batch_size=8)
    learner = make_learner(recipe, world)
    train_update, tokens = learner.train_update, []

    def counted(part: Batch, *rest: object) -> object:
        tokens.append(int(part.lengths.sum()))
        return train_update(part, *rest)

    learner.train_update = counted
    metrics = learner.update(my_share(batch, world), 0).metrics
    return {"metrics": metrics, "weights": export_all(learner).tolist(), "tokens": tokens}


def reference(layout: dict, lora: dict | None = None) -> dict:
    """Log-probs of learner and reference, before and after updates; the weights around a score."""
    world = join_world(**layout)
    recipe = family_recipe(DENSE, layout, lora, learner={"optimizer": {"lr": 1e-3}})
    learner = make_learner(recipe, world)
    learner.keep_reference()
    mine = my_share(answered(), world)
    first = learner.score(mine)
    for _ in range(3):
        learner.supervised_update(mine)
    weights = shards_of(learner)
    then = learner.score(mine)
    return {
        "same_at_first": torch.equal(first.reference_logprobs, first.pi_logprobs),
        "same_reference": torch.equal(then.reference_logprobs, first.pi_logprobs),
        "moved": (then.pi_logprobs - first.pi_logprobs).abs().max().item(),
        "weights_kept": weights == shards_of(learner),
        "not_for_checks": learner.score(mine, 1.0).reference_logprobs is None,
    }


def weights_beyond() -> list[str]:
    """What the export says of an infinite weight, and of one that only servers in fp16 cannot hold."""
    import tempfile

    from megatron_fp16rl.learner.export import WeightRangeError

    world, said = join_world(), []
    for precision, weight in (
        ({"dtype": "fp16"}, torch.inf),
        ({"dtype": "bf16", "rollout": "fp16"}, -70_000),
    ):
        learner = make_learner(models.recipe(precision=precision), world)
        with torch.no_grad():
            learner.model.gpt_models[0].decoder.final_layernorm.weight[0] = weight
        if weight != torch.inf:  # as bf16 it is in order
            learner.save(Path(tempfile.mkdtemp()) / "bf16", learner.hf_dir)
        try:
            list(learner.export())
        except WeightRangeError as error:
            said.append(str(error))
    return said


def too_long() -> list[str]:
    """Where a learner whose attention is not fused refuses a long recipe, and a long batch."""
    from megatron_fp16rl import platform
    from megatron_fp16rl.recipe import RecipeError

    world = join_world()
    platform.current().attention = lambda config, dtype, tokens, packed: "unfused"
    refused = []
    for length, tokens in ((2049, 9), (2048, 2049)):
        recipe = models.recipe(rollout={"prompts": 4, "samples": 4, "max_new_tokens": length})
        try:
            learner = make_learner(recipe, world)
        except RecipeError:
            refused.append("learner")
            continue
        try:
            learner.score(Batch.from_token_ids([[3] * tokens]))
        except RecipeError:
            refused.append("batch")
    return refused
