"""A recipe's plan: whether it fits, what memory it takes, how long a step may last, what to change."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from traceback import walk_tb
from typing import Any

from transformers import PretrainedConfig

from megatron_fp16rl import platform
from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.tools.plan import checks
from megatron_fp16rl.tools.plan.gpus import GIB, Gpu, gpu_of
from megatron_fp16rl.tools.plan.memory import LearnerMemory, learner_memory
from megatron_fp16rl.tools.plan.rank import RankMemory
from megatron_fp16rl.tools.plan.servers import ServerMemory, server_memory
from megatron_fp16rl.tools.plan.suggest import Suggestion, balance, suggest
from megatron_fp16rl.tools.plan.times import Times, estimate

# Experts are not chosen evenly in RL: the fullest rank is taken to get this many times its share. A guess:
# see docs/planner.md.
EXPERT_LOAD = 1.5


@dataclass(frozen=True)
class Plan:
    """reasons: why the recipe does not fit or cannot run; none if it can."""

    recipe: Recipe
    gpu: Gpu
    learner: LearnerMemory | None  # None where Megatron refuses to build the recipe's ranks
    servers: ServerMemory
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
    """Plans a recipe for a kind of GPU. Raises RecipeError for a model that cannot be read.

    search: look for changes with which it would fit, if it does not, or be faster. mean_tokens: see times.estimate.
    """
    platform.plan_only()
    config, hardware = model_config(recipe.model), gpu_of(gpu, recipe)
    servers = server_memory(recipe, config, hardware)
    learner, refusal = _learner(recipe, config, progress)
    reasons = [*checks.errors(recipe, config), *servers.reasons]
    reasons += [refusal] if learner is None else _too_large(learner, hardware) + learner.faults[:5]
    times = None if learner is None else estimate(recipe, config, hardware, mean_tokens)
    suggestions: list[Suggestion] = []
    if search and learner is not None:
        progress("looking for changes with which it fits, or is faster")
        better = suggest if reasons else balance
        suggestions = better(recipe, config, hardware, lambda r: _fits(r, config, hardware))
    return Plan(
        recipe=recipe,
        gpu=hardware,
        learner=learner,
        servers=servers,
        times=times,
        reasons=reasons,
        warnings=[] if times is None else checks.warnings(recipe, config, times.step_s),
        suggestions=suggestions,
    )


def _fits(recipe: Recipe, config: PretrainedConfig, gpu: Gpu) -> bool:
    if checks.errors(recipe, config) or server_memory(recipe, config, gpu).reasons:
        return False
    learner, _ = _learner(recipe, config, lambda line: None)
    return learner is not None and not _too_large(learner, gpu)


def _learner(
    recipe: Recipe, config: PretrainedConfig, progress: Callable[[str], None]
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
    """Whether Megatron's code raised it, and not ours: a bug of ours must not read as a refusal."""
    modules = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    packages = [m.partition(".")[0] for m in modules if not m.endswith(".live_bytes")]
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


def as_json(plan: Plan) -> dict[str, Any]:
    """For `fp16rl plan --json`."""
    learner, peak = plan.learner, plan.learner.worst.peak if plan.learner else None
    return {
        "fits": plan.fits,
        "reasons": plan.reasons,
        "warnings": plan.warnings,
        "gpu": plan.gpu.name,
        "usable_gib": round(plan.gpu.memory / GIB, 3),
        "peak_gib": None if peak is None else round(peak / GIB, 3),
        "margin_gib": None if peak is None else round((plan.gpu.memory - peak) / GIB, 3),
        "ranks": [_rank_as_json(rank) for rank in learner.ranks] if learner else [],
        "tensors_proved": len(learner.exported) if learner else None,
        "servers": asdict(plan.servers),
        **({} if plan.times is None else asdict(plan.times)),
        "suggestions": [asdict(suggestion) for suggestion in plan.suggestions],
    }


def _rank_as_json(rank: RankMemory) -> dict[str, Any]:
    """Bytes in GiB, under names that end in _gib."""
    values = {name: value for name, value in asdict(rank).items() if name != "weights"}
    plain = {name: values.pop(name) for name in ("stage", "ranks", "in_flight")}
    values |= {"params": rank.weights, "optimizer": rank.optimizer}
    values |= {"static": rank.static, "peak": rank.peak}
    return plain | {f"{name}_gib": round(value / GIB, 3) for name, value in values.items()}
