"""A recipe's plan: whether it fits, what it takes, how long a step may last, what to change."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from traceback import walk_tb

from megatron_fp16rl import platform
from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.tools.plan import checks, gpus, live
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.memory import GIB, LearnerMemory, as_gib, learner_memory
from megatron_fp16rl.tools.plan.search import Suggestion, suggest
from megatron_fp16rl.tools.plan.servers import (
    ServerMemory,
    admitted,
    admitted_experts,
    server_memory,
)
from megatron_fp16rl.tools.plan.times import Times, estimate

# Routers of a mixture of experts are not balanced in RL; the fullest rank is taken to get this many
# times its share. A guess: see docs/planner.md.
EXPERT_LOAD = 1.5


@dataclass(frozen=True)
class Plan:
    """reasons: why the recipe does not fit or cannot run; none if it can.

    learner, times   None where Megatron refuses to build the recipe's ranks
    admitted         sizes of rollout.tensor_parallel that SGLang takes for the model, and of ep_size with
                     the recipe's tensor parallelism
    """

    recipe: Recipe
    gpu: Gpu
    learner: LearnerMemory | None
    servers: ServerMemory
    admitted: tuple[list[int], list[int]]
    times: Times | None
    reasons: list[str]
    warnings: list[str] = field(default_factory=list)
    suggestions: list[Suggestion] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.reasons


def plan(
    recipe: Recipe,
    gpu: str,
    progress: Callable[[str], None] = lambda line: None,
    search: bool = True,
    mean_tokens: float | None = None,
) -> Plan:
    """Plans a recipe for GPUs of a kind. Raises RecipeError for a model that cannot be read.

    search: look for changes with which it would fit, if it does not. mean_tokens: of responses, for the
    times; see times.estimate.
    """
    platform.plan_only()
    config, facts = model_config(recipe.model), gpus.of(gpu, recipe)
    servers = server_memory(recipe, config, facts)
    sizes = admitted(config), admitted_experts(config, recipe.rollout.tensor_parallel)
    reasons = [*checks.errors(recipe, config), *servers.reasons]
    learner, refusal = _build(recipe, config, progress)
    if learner is None:
        return Plan(recipe, facts, None, servers, sizes, None, [*reasons, refusal])
    found = Plan(
        recipe,
        facts,
        learner,
        servers,
        sizes,
        times := estimate(recipe, config, facts, mean_tokens),
        reasons + _too_large(learner, facts) + learner.proof.faults[:5],
        checks.warnings(recipe, config, times.step_s),
    )
    if found.fits or not search:
        return found
    progress("looking for changes with which it fits")
    changes = suggest(recipe, config, facts, functools.partial(_fits, config=config, gpu=facts))
    return Plan(**{**vars(found), "suggestions": changes})


def _build(
    recipe: Recipe, config: object, progress: Callable[[str], None]
) -> tuple[LearnerMemory | None, str]:
    """The learner's memory, or why Megatron would not build it."""
    from megatron_fp16rl.platform import meta

    try:
        with meta.assuming(expert_load=EXPERT_LOAD):
            return learner_memory(recipe, config, progress), ""
    except RecipeError as error:
        return None, str(error)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if not _is_megatrons(error):
            raise
        return None, f"Megatron-core refuses the recipe: {error or type(error).__name__}"


def _is_megatrons(error: Exception) -> bool:
    """Whether Megatron's code, and not ours, was the last of the two to run."""
    modules = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules if name != live.__name__]  # it looks on
    return [p for p in packages if p in ("megatron", "megatron_fp16rl")][-1] == "megatron"


def _too_large(learner: LearnerMemory, gpu: Gpu) -> list[str]:
    worst = learner.worst
    if worst.peak <= gpu.memory:
        return []
    parts = {
        "weights and gradients": worst.weights + worst.gradients,
        "main weights and Adam": worst.optimizer,
        "activations": worst.training,
    }
    most = max(parts, key=parts.__getitem__)
    return [
        f"a learner rank of pipeline stage {worst.stage} needs {worst.peak / GIB:.1f} GiB of "
        f"{gpu.memory / GIB:.1f} GiB; most of it is {most} ({parts[most] / GIB:.1f} GiB)"
    ]


def _fits(recipe: Recipe, config: object, gpu: Gpu) -> bool:
    if checks.errors(recipe, config) or server_memory(recipe, config, gpu).reasons:
        return False
    learner, _ = _build(recipe, config, lambda line: None)
    return learner is not None and not _too_large(learner, gpu)


def as_json(found: Plan) -> dict[str, object]:
    """For `fp16rl plan --json`."""
    learner, times = found.learner, found.times
    worst = learner.worst.peak if learner else None
    return {
        "fits": found.fits,
        "reasons": found.reasons,
        "warnings": found.warnings,
        "gpu": found.gpu.name,
        "usable_gib": round(found.gpu.memory / GIB, 3),
        "peak_gib": None if worst is None else round(worst / GIB, 3),
        "margin_gib": None if worst is None else round((found.gpu.memory - worst) / GIB, 3),
        "ranks": [as_gib(rank) for rank in learner.ranks] if learner else [],
        "tensors_proved": learner.proof.tensors if learner else None,
        "servers": {
            **asdict(found.servers),
            "admitted_tensor_parallel": found.admitted[0],
            "admitted_expert_parallel": found.admitted[1],
        },
        **({} if times is None else asdict(times)),
        "suggestions": [asdict(change) for change in found.suggestions],
    }
