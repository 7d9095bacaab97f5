"""What speaks against a recipe without building anything: lengths, batches, numbers that disagree."""

import math
from collections.abc import Iterator
from pathlib import Path

from transformers import PretrainedConfig

from megatron_fp16rl.models import source
from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.recipe import Recipe, Slurm
from megatron_fp16rl.tools.plan.lengths import longest, micro_batches


def errors(recipe: Recipe, config: PretrainedConfig) -> list[str]:
    """Why the recipe cannot run, on any machine."""
    lengths, positions = longest(recipe), config.max_position_embeddings
    text = f"prompts of {lengths.prompt} and responses of {lengths.response} tokens"
    lines = []
    if lengths.sequence > positions:
        lines.append(
            f"{text} make {lengths.sequence}, but the model has {positions} positions "
            "(max_position_embeddings); lower task.max_prompt_tokens or rollout.max_new_tokens"
        )
    context = recipe.rollout.sglang.get("context_length")
    if context is not None and lengths.sequence > int(context):
        lines.append(
            f"{text} make {lengths.sequence}, but rollout.sglang.context_length={context}; raise it, "
            "or lower task.max_prompt_tokens or rollout.max_new_tokens"
        )
    return lines


def warnings(recipe: Recipe, config: PretrainedConfig, step_s: float) -> list[str]:
    """What a user should know before the recipe is queued. step_s: the time of a step."""
    lines = [*_model(recipe), *_batches(recipe), *_updates(recipe, config.model_type)]
    return lines if recipe.slurm is None else [*lines, *_jobs(recipe, recipe.slurm, step_s)]


def _model(recipe: Recipe) -> Iterator[str]:
    """A model that is not on this machine is planned by its shape, which may be that of another."""
    model = recipe.model
    if model.path is None or model.shape is None or source.local_folder(model.path) is not None:
        return
    name = source.name_in(Path(model.shape))
    if name is not None and name != model.path:
        yield (
            f"model.path={model.path} is not here: it is planned as {name}, whose shape the recipe gives; "
            "if it is of another, say --set model.shape=CONFIG_JSON"
        )


def _batches(recipe: Recipe) -> Iterator[str]:
    lengths, learner = longest(recipe), recipe.learner
    if lengths.is_assumed:
        yield (
            f"task.max_prompt_tokens is not set: prompts are assumed to have {lengths.prompt} tokens at "
            "the most, and a longer one may not fit"
        )
    budget, ranks = learner.micro_batch_tokens, learner.context_parallel
    of_rank = -(-lengths.sequence // ranks)
    if budget < of_rank:
        of = f" of {ranks} context-parallel ranks" if ranks > 1 else ""
        yield (
            f"learner.micro_batch_tokens={budget}{of} is less than the longest sequence "
            f"({lengths.sequence}), which goes alone: memory is that of {of_rank} tokens"
        )
    stages, count = learner.pipeline_parallel, micro_batches(recipe)
    if stages > 1 and count < 2 * stages:
        idle = (stages - 1) / (count * learner.model_chunks + stages - 1)
        yield (
            f"an update has {count} micro-batches for {stages} pipeline stages: each idles "
            f"{100 * idle:.0f} % of it; raise learner.global_batch_size or lower micro_batch_tokens"
        )


def _updates(recipe: Recipe, model_type: str) -> Iterator[str]:
    rollout, learner, scale = recipe.rollout, recipe.learner, recipe.precision.loss_scale
    updates = rollout.prompts * rollout.samples // learner.global_batch_size * recipe.trainer.steps
    if updates and learner.optimizer.warmup_updates >= updates:
        yield (
            f"learner.optimizer.warmup_updates={learner.optimizer.warmup_updates}, but the run has "
            f"{updates} updates: the learning rate never gets to lr"
        )
    if recipe.precision.dtype != "fp16":
        return
    if updates and scale.window > updates:
        yield (
            f"precision.loss_scale.window={scale.window}, but the run has {updates} updates: the loss "
            "scale never rises"
        )
    limit, text = FAMILIES[model_type].fp16_range or (math.inf, "")
    if scale.initial > limit:
        yield f"precision.loss_scale.initial={scale.initial:g}, {model_type} in fp16: {text}"


def _jobs(recipe: Recipe, slurm: Slurm, step_s: float) -> Iterator[str]:
    for name, (devices, nodes) in slurm.devices(recipe.learner.ranks, recipe.server_gpus).items():
        gpus = slurm.gpus_per_node
        if gpus and nodes > (enough := -(-devices // gpus)):
            yield (
                f"slurm.{name}_nodes={nodes} x gpus_per_node={gpus} are {nodes * gpus} GPUs, of which {devices} "
                f"are used: {enough} node(s) would do"
            )
    usable, needed = slurm.seconds - slurm.warn_s, recipe.trainer.steps * step_s
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
