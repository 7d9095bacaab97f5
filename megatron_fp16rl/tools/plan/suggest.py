"""Single changes of a recipe with which it fits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import longest
from megatron_fp16rl.tools.plan.servers import admitted, server_memory
from megatron_fp16rl.tools.plan.times import estimate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Change = dict[str, bool | int | str]
_ENOUGH = 3  # suggestions; each candidate takes seconds to judge
_FULL_RECOMPUTE: Change = {
    "learner.megatron.recompute_granularity": "full",
    "learner.megatron.recompute_method": "uniform",
    "learner.megatron.recompute_num_layers": 1,
}


@dataclass(frozen=True)
class Suggestion:
    """changes: keys and values as for --set. nodes: of the whole job with them."""

    changes: Change
    step_s: float
    nodes: int


def suggest(
    recipe: Recipe, config: "PretrainedConfig", gpu: Gpu, fits: Callable[[Recipe], bool]
) -> list[Suggestion]:
    """Up to three changes with which `fits` holds: those of the fewest nodes first, then of the fastest steps.

    More nodes are tried only if nothing else helps. Servers that are too small for the model are made
    larger besides. Empty if no single change is enough.
    """
    servers = _larger_servers(recipe, config, gpu)
    if servers is None:
        return []
    for candidates in (_candidates(recipe), _more_nodes(recipe)):
        suggestions: list[Suggestion] = []
        for changes in [servers | change for change in candidates]:
            changed = changed_recipe(recipe, changes)
            if changed is None or not changes or not fits(changed):
                continue
            slurm = changed.slurm
            nodes = slurm.learner_nodes + slurm.rollout_nodes if slurm else 1
            suggestions.append(Suggestion(changes, estimate(changed, config, gpu).step_s, nodes))
            if len(suggestions) == _ENOUGH or changes == servers:
                break
        if suggestions:
            return sorted(suggestions, key=lambda s: (s.nodes, s.step_s))
    return []


def _candidates(recipe: Recipe) -> list[Change]:
    """Changes of the learner that save memory on as many GPUs, those that cost least time first."""
    learner = recipe.learner
    tensor, sequence = learner.tensor_parallel, learner.sequence_parallel
    changes: list[Change] = [{}]  # where larger servers are enough
    if not learner.distributed_optimizer:
        changes.append({"learner.distributed_optimizer": True})
    if tensor > 1 and not sequence:
        changes.append({"learner.sequence_parallel": True})
    least, budget = longest(recipe).sequence, learner.micro_batch_tokens
    smaller = [2**i for i in range(20, 0, -1) if least <= 2**i < budget][:2]
    changes += [{"learner.micro_batch_tokens": tokens} for tokens in smaller]
    if learner.megatron.get("recompute_granularity") != "full":
        changes.append(_FULL_RECOMPUTE)
    changes += [
        {"learner.tensor_parallel": n, "learner.sequence_parallel": True}
        for n in (2 * tensor, 4 * tensor)
        if n <= 8
    ]
    pipeline, experts = learner.pipeline_parallel, learner.expert_parallel
    changes += [{"learner.pipeline_parallel": n} for n in (2 * pipeline, 4 * pipeline)]
    changes += [{"learner.expert_parallel": n} for n in (2 * experts, 4 * experts)]
    return changes


def _more_nodes(recipe: Recipe) -> list[Change]:
    """The learner on two and four times the nodes."""
    changes = []
    for times in (2, 4):
        change: Change = {"learner.ranks": recipe.learner.ranks * times}
        if recipe.slurm is not None:
            change["slurm.learner_nodes"] = recipe.slurm.learner_nodes * times
        changes.append(change)
    return changes


def _larger_servers(recipe: Recipe, config: "PretrainedConfig", gpu: Gpu) -> Change | None:
    """Fewer and larger servers that hold the model, on as many GPUs.

    Empty if the recipe's own do; None if none do.
    """
    settings = recipe.rollout
    if not server_memory(recipe, config, gpu).reasons:
        return {}
    gpus = settings.servers * settings.tensor_parallel
    for parts in admitted(config):
        if gpus % parts or parts <= settings.tensor_parallel:
            continue
        change: Change = {"rollout.tensor_parallel": parts, "rollout.servers": gpus // parts}
        changed = changed_recipe(recipe, change)
        if changed is not None and not server_memory(changed, config, gpu).reasons:
            return change
    return None


def changed_recipe(recipe: Recipe, changes: Change) -> Recipe | None:
    """The recipe with keys set as --set would; None if that is no recipe."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None
