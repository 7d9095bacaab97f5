"""Problems made by the generators of reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

from typing import Any

from megatron_fp16rl.data.rewards import functions
from megatron_fp16rl.data.rewards.workers import WorkerPool
from megatron_fp16rl.recipe import ReasoningGymTask, RecipeError


def load(settings: ReasoningGymTask) -> list[tuple[str, str]]:
    """(problem, answer) of every problem. Raises RecipeError."""
    return [(entry["question"], str(entry["answer"])) for entry in generator(settings)]


def generator(settings: ReasoningGymTask) -> Any:
    """The reasoning-gym data set. Raises RecipeError if it is not installed or not so configured."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise RecipeError(f"task.kind=reasoning_gym: {error}; pip install reasoning-gym") from None
    if settings.name not in DATASETS:
        raise RecipeError(
            f"task.name={settings.name}: reasoning-gym has no such generator; "
            f"it has {', '.join(sorted(DATASETS))}"
        )
    try:
        return reasoning_gym.create_dataset(settings.name, **_options(settings))
    except (TypeError, AssertionError, ValueError) as error:
        raise RecipeError(f"task.options of {settings.name}: {error}") from None


def verifier(settings: ReasoningGymTask) -> WorkerPool:
    """The generator's own, in worker processes: some evaluate what the model wrote."""
    return WorkerPool(settings.reward, functions.reasoning_gym, settings.name, _options(settings))


def _options(settings: ReasoningGymTask) -> dict[str, Any]:
    return {**settings.options, "size": settings.size, "seed": settings.seed}
