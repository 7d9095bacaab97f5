"""Changes of a recipe with which it fits, or with which neither learner nor servers wait for long."""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError
from transformers import PretrainedConfig

from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import longest
from megatron_fp16rl.tools.plan.times import estimate

Change = dict[str, bool | int | str]
_GAIN = 0.95  # of the step's time, at most, for nodes to change sides
_ENOUGH = 3  # suggestions; each candidate takes seconds to judge


@dataclass(frozen=True)
class Suggestion:
    """changes: keys and values as for --set. nodes: of the whole job with them."""

    changes: Change
    step_s: float
    nodes: int


def suggest(
    recipe: Recipe, config: PretrainedConfig, gpu: Gpu, fits: Callable[[Recipe], bool]
) -> list[Suggestion]:
    """Up to three changes with which `fits` holds, tried in the order of what they cost."""
    suggestions: list[Suggestion] = []
    for changes in _candidates(recipe):
        changed = changed_recipe(recipe, changes)
        if changed is None or not fits(changed):
            continue
        slurm = changed.slurm
        nodes = slurm.nodes if slurm else 1
        suggestions.append(Suggestion(changes, estimate(changed, config, gpu).step_s, nodes))
        if len(suggestions) == _ENOUGH:
            break
    return suggestions


def balance(
    recipe: Recipe, config: PretrainedConfig, gpu: Gpu, fits: Callable[[Recipe], bool]
) -> list[Suggestion]:
    """The fastest split of the recipe's nodes between learner and servers, if it is faster by 5 %.

    Ranks and servers grow and shrink with their nodes; the layout of a replica stays. `fits` is asked of
    splits in the order of their time, until it holds.
    """
    slurm, now = recipe.slurm, estimate(recipe, config, gpu).step_s
    if slurm is None or not slurm.rollout_nodes:
        return []
    total = slurm.nodes
    splits: list[tuple[float, Change, Recipe]] = []
    for nodes in range(1, total):
        ranks, rest = divmod(recipe.learner.ranks * nodes, slurm.learner_nodes)
        servers, more = divmod(recipe.rollout.servers * (total - nodes), slurm.rollout_nodes)
        changes: Change = {
            "slurm.learner_nodes": nodes,
            "slurm.rollout_nodes": total - nodes,
            "learner.ranks": ranks,
            "rollout.servers": servers,
        }
        changed = None if rest or more else changed_recipe(recipe, changes)
        if changed is not None:
            step_s = estimate(changed, config, gpu).step_s
            if step_s < _GAIN * now:
                splits.append((step_s, changes, changed))
    for step_s, changes, changed in sorted(splits, key=lambda split: split[0]):
        if fits(changed):
            return [Suggestion(changes, step_s, total)]
    return []


def _candidates(recipe: Recipe) -> list[Change]:
    """Changes that save memory, those on as many GPUs first."""
    learner, rollout = recipe.learner, recipe.rollout
    alone = -(-longest(recipe).sequence // learner.context_parallel)
    smaller = max(alone, learner.micro_batch_tokens // 2)
    changes: list[Change] = [
        {"learner.distributed_optimizer": True},
        {"learner.micro_batch_tokens": smaller},
        {
            "learner.megatron.recompute_granularity": "full",
            "learner.megatron.recompute_method": "uniform",
            "learner.megatron.recompute_num_layers": 1,
        },
    ]
    for times in (2, 4):
        tensor, servers = learner.tensor_parallel * times, rollout.servers // times
        changes += [
            {
                "rollout.tensor_parallel": rollout.tensor_parallel * times,
                "rollout.servers": max(1, servers),
            },
            {"learner.tensor_parallel": tensor, "learner.sequence_parallel": True},
            {"learner.pipeline_parallel": learner.pipeline_parallel * times},
            {"learner.expert_parallel": learner.expert_parallel * times},
        ]
    more: Change = {"learner.ranks": 2 * learner.ranks}
    if recipe.slurm is not None:
        more["slurm.learner_nodes"] = 2 * recipe.slurm.learner_nodes
    return [*changes, more]


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
