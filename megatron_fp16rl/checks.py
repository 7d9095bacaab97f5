"""Checks of a recipe before anything is queued: its model, template, problems, graders, suites."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.data import tasks
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.data.tasks.dataset import task_of
from megatron_fp16rl.models import build, source
from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.recipe import (
    TORCH_DTYPES,
    AdditionTask,
    Problems,
    Recipe,
    RecipeError,
    Suite,
    Task,
)
from megatron_fp16rl.recipe.algorithm import LOSSES

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_LONGEST = 32  # problems whose tokens are counted: those with the most characters
_HELD_OUT_METRICS = ("eval/accuracy", "eval/errors", "eval/timeouts")


def check(recipe: Recipe, partial: bool = False) -> None:
    """Raises RecipeError if a run of the recipe could not begin, or would misread its data.

    partial: for plans and rehearsals, which need no weights and no data: absent files are passed over.
    """
    tokenizer = check_model(recipe, partial)
    if recipe.algorithm.loss not in LOSSES:  # the user's own
        from megatron_fp16rl.algorithms import losses  # torch: other recipes need not wait for it

        losses.find(recipe.algorithm.loss)
    if recipe.rollout.function is not None and not partial:
        from megatron_fp16rl.rollout import function

        function.find(recipe.rollout.function)
    replay = recipe.rollout.replay
    if replay is not None and not partial and not any(Path(replay).glob("step_*.jsonl")):
        raise RecipeError(
            f"rollout.replay={replay} holds no recorded samples, e.g. step_00000.leader_0.jsonl; name the "
            "rollouts/ folder of a run with rollout.record: true"
        )
    if recipe.rollout.sglang.get("allow_auto_truncate"):
        raise RecipeError(
            "rollout.sglang.allow_auto_truncate: servers would cut prompts in silence; remove it, and leave "
            "long problems out with task.max_prompt_tokens"
        )
    of_rollouts = recipe.rollout.max_new_tokens
    most = of_rollouts  # tokens of a response to the recipe's own problems
    checked_tasks: list[tuple[Task, int]] = []  # with the tokens of a response
    for suite in recipe.trainer.suites:
        tokens = suite.max_new_tokens or of_rollouts
        if not suite.is_file:
            most = max(most, tokens)
        elif not partial or Path(suite.source).exists():
            checked_tasks.append((task_of(suite, recipe), tokens))
    if tasks.is_here(recipe.task) or not partial:
        checked_tasks.insert(0, (recipe.task, most))
    if isinstance(recipe.task, AdditionTask) and tokenizer is not None:
        _check_context(recipe, 2 * recipe.task.digits + 2, most)
    for task, tokens in checked_tasks:
        checked = tasks.check(task, partial)
        if task is recipe.task:
            check_held_out(recipe, checked.held_out)
        if tokenizer is not None and isinstance(task, Problems) and checked.problems:
            templates.check(task, tokenizer, checked.problems[0])
            _check_lengths(recipe, task, checked.problems, tokenizer, tokens)


def _check_lengths(
    recipe: Recipe,
    task: Problems,
    problems: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    new_tokens: int,
) -> None:
    """Raises RecipeError if a prompt and its response may not fit."""
    limit = task.max_prompt_tokens
    by_length = sorted(problems, key=len, reverse=True)
    prompts = (templates.render(task, problem, tokenizer) for problem in by_length)
    lengths = (len(templates.encode(task.template, prompt, tokenizer)) for prompt in prompts)
    kept = (length for length in lengths if limit is None or length <= limit)
    longest = max(itertools.islice(kept, _LONGEST), default=None)
    if longest is None:
        raise RecipeError(
            f"task.max_prompt_tokens={limit}: of {len(problems)} problems every one is longer; raise it"
        )
    _check_context(recipe, longest, new_tokens)


def _check_context(recipe: Recipe, longest: int, new_tokens: int) -> None:
    """Raises RecipeError if a prompt of `longest` tokens leaves no room: a server would refuse it in mid-run."""
    if recipe.rollout.replay is not None:
        return  # nothing is sampled
    positions = model_config(recipe.model).max_position_embeddings
    context = int(recipe.rollout.sglang.get("context_length") or positions)
    if longest + new_tokens > context:
        room = context - new_tokens
        of_problems = isinstance(recipe.task, Problems) and room > 0
        raise RecipeError(
            f"a prompt of {longest} tokens and a response of {new_tokens} are more than the context of "
            f"{context} (max_position_embeddings, or rollout.sglang.context_length); lower max_new_tokens"
            + (
                f", or leave long problems out: task.max_prompt_tokens={room}"
                if of_problems
                else ""
            )
        )


def check_held_out(recipe: Recipe, count: int) -> None:
    """Raises RecipeError if something needs held-out problems, and `count` is 0.

    Without any, training prompts verify the weights, and there is no eval/accuracy.
    """
    needs = [f"gates: {gate.metric}" for gate in recipe.gates if gate.metric in _HELD_OUT_METRICS]
    suites = recipe.trainer.suites
    needs += [
        f"trainer.suites: {suite.suite}" for suite in suites if suite.source == Suite.HELD_OUT
    ]
    if recipe.warm_start is not None:
        needs.append(f"warm_start.accuracy={recipe.warm_start.accuracy:g}")
    if needs and not count:
        raise RecipeError(
            f"{', '.join(needs)}: asks for held-out problems, and task.held_out="
            f"{recipe.task.held_out:g} leaves none; raise it, or remove what asks"
        )


def check_model(recipe: Recipe, partial: bool = False) -> "PreTrainedTokenizerBase | None":
    """The model's tokenizer, after a check of configuration, tokens, template and weights' headers.

    None if the model is not on this machine. Raises RecipeError with file, key or tensor, and remedy.
    partial: for plans: absent weights and tokenizers are passed over.
    """
    model = recipe.model
    config: PretrainedConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    if model.build is not None:
        config = build.built_config(model.build)
        tokenizer = build.built_tokenizer(model.build)
    elif folder := source.local_folder(model.path or ""):
        from megatron_fp16rl.models.check import check_generation, check_tensors
        from megatron_fp16rl.models.folder import HFFolder
        from megatron_fp16rl.models.tokenizer import load_tokenizer

        def needed(*names: str) -> bool:
            return not partial or any((folder / name).exists() for name in names)

        config = load_config(folder)
        check_generation(folder, config)
        if needed(source.SINGLE, source.INDEX):
            check_tensors(HFFolder(folder), config)
        if needed("tokenizer.json", "tokenizer_config.json"):
            tokenizer = load_tokenizer(folder)
    if config is not None and recipe.servers:
        from megatron_fp16rl.models.spec import check_served

        check_served(config, None if model.build else TORCH_DTYPES[recipe.precision.served])
    if tokenizer is None:
        return None
    if isinstance(recipe.task, Problems):
        templates.check(recipe.task, tokenizer)
    if recipe.warm_start is not None and tokenizer.eos_token_id is None:
        raise RecipeError(
            "warm_start: the model's tokenizer has no eos_token to end answers with; set it in its "
            "tokenizer_config.json"
        )
    return tokenizer
