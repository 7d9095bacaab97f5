"""What a recipe is held against before anything is queued: its model, template, problems, graders, suites."""

from megatron_fp16rl import tasks
from megatron_fp16rl.evaluation import suites
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.tasks import templates
from megatron_fp16rl.tasks.model import check_model

_OF_HELD_OUT = ("eval/accuracy", "eval/errors", "eval/timeouts")


def check(recipe: Recipe) -> None:
    """Raises RecipeError if a run of the recipe could not begin, or would read its data amiss."""
    tokenizer = check_model(recipe)
    count, problem = tasks.check(recipe.task)
    check_held_out(recipe, count)
    if tokenizer is not None and problem is not None:
        templates.check(recipe.task, tokenizer, problem)
    for settings in recipe.trainer.suites:
        suite = suites.parse(settings.suite)
        if suite.source not in (suites.HELD_OUT, suites.TRAINING):
            tasks.check(suites.task_of(suite, recipe))


def check_held_out(recipe: Recipe, count: int) -> None:
    """Raises RecipeError if there are no held-out problems, and something asks for them.

    count: of held-out problems. Without any, weights are verified with training prompts, and there is no
    eval/accuracy.
    """
    if count:
        return
    asks = [f"gates: {gate.metric}" for gate in recipe.gates if gate.metric in _OF_HELD_OUT]
    asks += [
        f"trainer.suites: {settings.suite}"
        for settings in recipe.trainer.suites
        if suites.parse(settings.suite).source == suites.HELD_OUT
    ]
    if recipe.warm_start is not None:
        asks.append(f"warm_start.accuracy={recipe.warm_start.accuracy:g}")
    if asks:
        held_out = recipe.task.held_out
        raise RecipeError(
            f"{', '.join(asks)}: asks for held-out problems, and task.held_out={held_out:g} leaves none; "
            "raise it, or remove what asks"
        )
