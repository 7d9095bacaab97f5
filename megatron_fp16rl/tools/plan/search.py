"""What to change so that a recipe fits: a search over the few keys that move memory about."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.tools.plan.arithmetic import Costs, costs
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import longest
from megatron_fp16rl.tools.plan.servers import admitted, server_memory
from megatron_fp16rl.tools.plan.times import estimate

Value = bool | int | str
Change = dict[str, Value]
_JUDGED = 20  # recipes that `fits` is asked about, which takes seconds; so many of as many changes:
_A_LEVEL = 6
_AT_ONCE = 3  # changes of one suggestion
_HOPELESS = 1.2  # times the GPU's memory, by a rough count that is off by a fifth or so
_FULL_RECOMPUTE: Change = {
    "learner.megatron.recompute_granularity": "full",
    "learner.megatron.recompute_method": "uniform",
    "learner.megatron.recompute_num_layers": 1,
}


@dataclass(frozen=True)
class Suggestion:
    """changes: keys and values as for --set. nodes: of the whole job then."""

    changes: Change
    step_s: float
    nodes: int


def suggest(
    recipe: Recipe,
    config: object,
    gpu: Gpu,
    fits: Callable[[Recipe], bool],
    limit: int = 3,
) -> list[Suggestion]:
    """The smallest changes that make a recipe fit, those of the fastest steps first.

    config: the model's transformers configuration. fits: whether a recipe does; it is asked at most 20
    times, so a rough count of memory goes before it. Fewer changes are tried before more, and more nodes
    only if nothing else helps. Empty if nothing was found.
    """
    asked = 0
    for level in _levels(recipe, config, gpu):
        found: list[Suggestion] = []
        for suggestion, changed in level[:_A_LEVEL]:
            if len(found) == limit or asked == _JUDGED:
                break
            asked += 1
            if _holds(fits, changed):
                found.append(suggestion)
        if found or asked == _JUDGED:
            return sorted(found, key=lambda suggestion: suggestion.step_s)
    return []


def _holds(fits: Callable[[Recipe], bool], recipe: Recipe) -> bool:
    try:
        return fits(recipe)
    except RecipeError:  # what Megatron refuses is no suggestion
        return False


def _levels(recipe: Recipe, config: object, gpu: Gpu) -> Iterator[list[tuple[Suggestion, Recipe]]]:
    """Hopeful recipes of as many nodes and changes, likely and fast ones first; then those of more."""
    model = costs(config)

    def order(candidate: tuple[Suggestion, Recipe]) -> tuple[bool, float]:
        return _rough(candidate[1], model) > gpu.memory, candidate[0].step_s

    axes, servers = _axes(recipe, model), _servers(recipe, config, gpu)
    for more in ([], *_more_nodes(recipe)):
        for count in range(_AT_ONCE + 1):
            picks = (
                [*more, *one, *values]
                for chosen in itertools.combinations(axes, count)
                for values in itertools.product(*chosen)
                for one in servers
            )
            made = (_judge(recipe, config, gpu, model, pick) for pick in picks if pick)
            level = [candidate for candidate in made if candidate is not None]
            yield sorted(level, key=order)


def _judge(
    recipe: Recipe, config: object, gpu: Gpu, model: Costs, picked: list[Change]
) -> tuple[Suggestion, Recipe] | None:
    """The recipe with these changes; None where it is none, or hopeless."""
    changes = {key: value for change in picked for key, value in change.items()}
    try:
        changed = changed_recipe(recipe, changes)
        describe(config, changed.learner)
    except (ValidationError, RecipeError):
        return None
    if _rough(changed, model) > _HOPELESS * gpu.memory:
        return None
    slurm = changed.slurm
    nodes = slurm.learner_nodes + slurm.rollout_nodes if slurm else 1
    return Suggestion(changes, estimate(changed, config, gpu).step_s, nodes), changed


def changed_recipe(recipe: Recipe, changes: Change) -> Recipe:
    """The recipe with keys set as --set would. Raises ValidationError."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    return Recipe.model_validate(values)


def _axes(recipe: Recipe, model: Costs) -> list[list[Change]]:
    """What each key can become, itself left out."""
    learner = recipe.learner
    axes: list[list[Change]] = []
    if learner.megatron.get("recompute_granularity") != "full":
        axes.append([_FULL_RECOMPUTE])
    if not learner.distributed_optimizer:
        axes.append([{"learner.distributed_optimizer": True}])
    axes.append([{"learner.micro_batch_tokens": tokens} for tokens in _smaller_budgets(recipe)])
    axes.append(  # a mixture's tensor parallelism needs sequence parallelism; all save memory by it
        [
            {"learner.tensor_parallel": n, "learner.sequence_parallel": True}
            for n in _doubled(learner.tensor_parallel, 8)
        ]
    )
    if learner.tensor_parallel > 1 and not learner.sequence_parallel:
        axes.append([{"learner.sequence_parallel": True}])
    axes.append([{"learner.pipeline_parallel": n} for n in _doubled(learner.pipeline_parallel, 16)])
    if model.experts:
        axes.append([{"learner.expert_parallel": n} for n in _doubled(learner.expert_parallel, 64)])
    return [axis for axis in axes if axis]


def _doubled(value: int, most: int) -> list[int]:
    return [value * 2**i for i in range(1, 7) if value * 2**i <= most]


def _smaller_budgets(recipe: Recipe) -> list[int]:
    """Powers of two below the budget that still hold the longest sequence."""
    budget, least = recipe.learner.micro_batch_tokens, longest(recipe).sequence
    return [2**i for i in range(20, 0, -1) if least <= 2**i < budget][:3]


def _more_nodes(recipe: Recipe) -> list[list[Change]]:
    """The learner on twice, four, eight times the nodes."""
    changes = []
    for times in (2, 4, 8):
        change: Change = {"learner.ranks": recipe.learner.ranks * times}
        if recipe.slurm is not None:
            change["slurm.learner_nodes"] = recipe.slurm.learner_nodes * times
        changes.append([change])
    return changes


def _servers(recipe: Recipe, config: object, gpu: Gpu) -> list[list[Change]]:
    """[[]] if the servers hold the model, else changes with which they do, on as many GPUs."""
    settings = recipe.rollout
    if server_memory(recipe, config, gpu).fits:
        return [[]]
    gpus, found = settings.servers * settings.tensor_parallel, []
    for parts in admitted(config):
        if gpus % parts or parts <= settings.tensor_parallel or parts & (parts - 1):
            continue
        change: Change = {"rollout.tensor_parallel": parts, "rollout.servers": gpus // parts}
        try:
            if server_memory(changed_recipe(recipe, change), config, gpu).fits:
                found.append([change])
        except ValidationError:
            continue
    return found[:1]


def _rough(recipe: Recipe, model: Costs) -> float:
    """Bytes of the largest rank, to within a fifth or so: what is hopeless need not be built.

    6 bytes a parameter for weight and fp32 gradient, 12 for main weight and moments. Of activations, bytes
    a token, layer and hidden dimension as the planner's own stages have them: 2 where they are
    recomputed, else 25, and 10 for each time that the MLP is wider, 38 if it is of experts. Logits in half
    precision, their gradient and a copy.
    """
    learner = recipe.learner
    tensor, stages = learner.tensor_parallel, learner.pipeline_parallel
    spread = model.sparse_layers * model.experts * model.expert
    ways = learner.expert_parallel * learner.expert_tensor_parallel
    dense, sparse = (model.parameters - spread) / (tensor * stages), spread / (ways * stages)
    if learner.lora is not None:
        static = 2 * (dense + sparse)
    else:
        split = learner.distributed_optimizer
        replicas = max(1, learner.ranks // (ways * stages))
        static = 6 * (dense + sparse)
        static += 12 * dense / (learner.data_parallel if split else 1)
        static += 12 * sparse / (replicas if split else 1)
    tokens = max(learner.micro_batch_tokens, longest(recipe).sequence)
    layers = model.layers  # of all stages: as many micro-batches are in flight as there are stages
    cut = tensor if learner.sequence_parallel else 1
    if learner.megatron.get("recompute_granularity") == "full":
        each = 2 / cut
    elif model.experts:
        each = 25 / cut + 38 * model.top_k * model.moe_intermediate / model.hidden / tensor
    else:
        each = 19 / cut + (6 + 10 * model.intermediate / model.hidden) / tensor
    activations = tokens * model.hidden * layers * each
    return static + activations + 3 * 2 * tokens * model.vocabulary / tensor
