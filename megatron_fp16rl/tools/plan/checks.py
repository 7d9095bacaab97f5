"""What can be said against a recipe without building anything: lengths, batches, times that disagree."""

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_fp16rl.models import source
from megatron_fp16rl.recipe import Recipe, Slurm
from megatron_fp16rl.tools.plan.lengths import longest, micro_batches

# By model_type: the initial loss scale above which fp16's range is known to be short, and where. Seen
# with other systems (docs/precision.md), not here.
_BACKWARD = (
    "backward overflows along the residual stream were seen elsewhere; begin with 2^15 or less"
)
_RANGE = {
    "deepseek_v3": (
        0.0,
        "forward overflows were seen elsewhere with its predecessor, whose routed experts are scaled up "
        "too; no loss scale cures those: run fp16rl mismatch on the weights first",
    ),
    "qwen3_moe": (2.0**15, _BACKWARD),
    "glm4_moe": (2.0**15, _BACKWARD),
}


def errors(recipe: Recipe, config: object) -> list[str]:
    """Why the recipe cannot run, whatever the machine."""
    return list(_lengths(recipe, config))


def warnings(recipe: Recipe, config: object, step_s: float) -> list[str]:
    """What a user had better know before the recipe is queued. step_s: the time of a step."""
    found: list[str] = []
    for check in (_stands_for, _assumptions, _pipeline, _updates, _range):
        found += check(recipe, config)
    if recipe.slurm is not None:
        found += _jobs(recipe, recipe.slurm, step_s)
    return found


def _lengths(recipe: Recipe, config: object) -> Iterator[str]:
    lengths = longest(recipe)
    said = f"prompts of {lengths.prompt} and responses of {lengths.response} tokens"
    positions = config.max_position_embeddings
    if lengths.sequence > positions:
        yield (
            f"{said} make {lengths.sequence}, but the model has {positions} positions "
            "(max_position_embeddings); lower task.max_prompt_tokens or rollout.max_new_tokens"
        )
    context = recipe.rollout.sglang.get("context_length")
    if context is not None and lengths.sequence > int(context):
        yield (
            f"{said} make {lengths.sequence}, but rollout.sglang.context_length={context}; raise it, "
            "or lower task.max_prompt_tokens or rollout.max_new_tokens"
        )


def _stands_for(recipe: Recipe, _: object) -> Iterator[str]:
    model = recipe.model
    if model.shape is None or source.local_folder(model.path) is not None:
        return
    of = source.name_in(Path(model.shape))
    if of is not None and of != model.path:
        yield (
            f"model.path={model.path} is not here: it is planned as {of}, whose shape the recipe gives; "
            "if it is of another, say --set model.shape=CONFIG_JSON"
        )


def _assumptions(recipe: Recipe, _: object) -> Iterator[str]:
    lengths = longest(recipe)
    if lengths.is_assumed:
        yield (
            f"task.max_prompt_tokens is not set: prompts are assumed to have {lengths.prompt} tokens at "
            "the most, and a longer one may not fit"
        )
    budget = recipe.learner.micro_batch_tokens
    if budget < lengths.sequence:
        yield (
            f"learner.micro_batch_tokens={budget} is less than the longest sequence "
            f"({lengths.sequence}), which goes alone: memory is that of {lengths.sequence} tokens"
        )


def _pipeline(recipe: Recipe, _: object) -> Iterator[str]:
    stages, count = recipe.learner.pipeline_parallel, micro_batches(recipe)
    if stages > 1 and count < 2 * stages:
        idle = (stages - 1) / (count * recipe.learner.model_chunks + stages - 1)
        yield (
            f"an update has {count} micro-batches for {stages} pipeline stages: each idles "
            f"{100 * idle:.0f} % of it; raise learner.global_batch_size or lower micro_batch_tokens"
        )


def _updates(recipe: Recipe, _: object) -> Iterator[str]:
    rollout, learner = recipe.rollout, recipe.learner
    updates = rollout.prompts * rollout.samples // learner.global_batch_size * recipe.trainer.steps
    if updates and learner.optimizer.warmup_updates >= updates:
        yield (
            f"learner.optimizer.warmup_updates={learner.optimizer.warmup_updates}, but the run has "
            f"{updates} updates: the learning rate never gets to lr"
        )
    window = recipe.precision.loss_scale.window
    if recipe.precision.dtype == "fp16" and updates and window > updates:
        yield (
            f"precision.loss_scale.window={window}, but the run has {updates} updates: the loss scale "
            "never rises"
        )


def _range(recipe: Recipe, config: object) -> Iterator[str]:
    scale = recipe.precision.loss_scale.initial
    limit, said = _RANGE.get(config.model_type, (float("inf"), ""))
    if recipe.precision.dtype == "fp16" and scale > limit:
        yield f"precision.loss_scale.initial={scale:g}, {config.model_type} in fp16: {said}"


def _jobs(recipe: Recipe, slurm: Slurm, step_s: float) -> Iterator[str]:
    limit, needed = seconds(slurm.time), recipe.trainer.steps * step_s
    usable = limit - slurm.warn_s
    if usable < step_s:
        yield (
            f"slurm.time={slurm.time} less slurm.warn_s={slurm.warn_s} leaves {usable:.0f} s, and a step "
            f"may take {step_s:.0f} s: the job would be requeued without end; raise slurm.time"
        )
    elif needed > usable:
        yield (
            f"{recipe.trainer.steps} steps may take {needed / 3600:.0f} h, and slurm.time={slurm.time}: it "
            f"is queued about {math.ceil(needed / usable)} times, by itself or with fp16rl submit --chain"
        )


def seconds(time: str) -> float:
    """Of a time limit as Slurm writes it: minutes, h:m:s, m:s, days-h, days-h:m:s."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*numbers, 0, 0][:3]
        return int(days) * 86400.0 + hours * 3600 + minutes * 60 + secs
    if len(numbers) == 3:
        return numbers[0] * 3600.0 + numbers[1] * 60 + numbers[2]
    return numbers[0] * 60.0 + (numbers[1] if len(numbers) == 2 else 0)
