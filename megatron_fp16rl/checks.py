"""What a recipe is held against before anything is queued: its model, template, problems, graders, suites."""

from pathlib import Path

from megatron_fp16rl.data import tasks
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.models import build, source
from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.recipe import Problems, Recipe, RecipeError
from megatron_fp16rl.rollout.evaluation import suites

_LOOKED_AT = 32  # prompts, the longest
_OF_HELD_OUT = ("eval/accuracy", "eval/errors", "eval/timeouts")


def check(recipe: Recipe, partial: bool = False) -> None:
    """Raises RecipeError if a run of the recipe could not begin, or would read its data amiss.

    partial: for plans and rehearsals, which need no weights and no data: what is not here is not missed.
    """
    tokenizer = check_model(recipe, partial)
    if recipe.rollout.sglang.get("allow_auto_truncate"):
        raise RecipeError(
            "rollout.sglang.allow_auto_truncate: servers would cut prompts in silence; remove it, and leave "
            "long problems out with task.max_prompt_tokens"
        )
    tokens = recipe.rollout.max_new_tokens
    if tasks.is_here(recipe.task) or not partial:
        checked = tasks.check(recipe.task, partial)
        check_held_out(recipe, checked.held_out)
        if tokenizer is not None and checked.problems:
            templates.check(recipe.task, tokenizer, checked.problems[0])
            check_lengths(recipe, recipe.task, checked.problems, tokenizer, tokens)
    for settings in recipe.trainer.suites:
        suite = suites.parse(settings.suite)
        if suite.source in (suites.HELD_OUT, suites.TRAINING):
            continue
        if partial and not Path(suite.source).exists():
            continue
        task = suites.task_of(suite, recipe)
        checked = tasks.check(task, partial)
        if tokenizer is not None:
            tokens = settings.max_new_tokens or recipe.rollout.max_new_tokens
            check_lengths(recipe, task, checked.problems, tokenizer, tokens)


def check_lengths(
    recipe: Recipe, task: Problems, problems: list[str], tokenizer: object, new_tokens: int
) -> None:
    """Raises RecipeError if a prompt and its response may not fit: a server would refuse it in mid-run.

    Looks at the longest of those that task.max_prompt_tokens admits, as characters have it.
    """
    if recipe.rollout.replay is not None:
        return  # nothing is sampled
    limit, longest, asked, seen = task.max_prompt_tokens, 0, "", 0
    for problem in sorted(problems, key=len, reverse=True):
        text = templates.render(task, problem, tokenizer)
        length = len(templates.encode(task.template, text, tokenizer))
        if limit is not None and length > limit:
            continue
        if length > longest:
            longest, asked = length, problem
        seen += 1
        if seen == _LOOKED_AT:
            break
    context = int(
        recipe.rollout.sglang.get("context_length")
        or model_config(recipe.model).max_position_embeddings
    )
    if not seen:
        raise RecipeError(
            f"task.max_prompt_tokens={limit}: of {len(problems)} problems every one is longer; raise it"
        )
    if longest + new_tokens > context:
        raise RecipeError(
            f"a prompt of {longest} tokens ({asked[:60]!r}) and a response of {new_tokens} are more than "
            f"the context of {context} (max_position_embeddings, or rollout.sglang.context_length); lower "
            f"max_new_tokens, or leave long problems out: task.max_prompt_tokens={context - new_tokens}"
        )


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


def check_model(recipe: Recipe, partial: bool = False) -> object | None:
    """Raises RecipeError for what is wrong with a model that is here: by file, key or tensor, and remedy.

    Configuration, tokens, the task's template, stops, the headers of all weights. Returns its tokenizer;
    None of a model that is not here, of which nothing is known.

    partial: for plans, which need no weights and no tokenizer: those that are not here are not missed.
    """
    model = recipe.model
    if model.build is not None:
        build.built_config(model.build)
        tokenizer = build.built_tokenizer(model.build)
        _check_tokenizer(recipe, tokenizer)
        return tokenizer
    folder = source.local_folder(model.path)
    if folder is None:
        return None
    from megatron_fp16rl.models.check import check_generation, check_tensors
    from megatron_fp16rl.models.folder import HFFolder
    from megatron_fp16rl.models.tokenizer import load_tokenizer

    config = load_config(folder)
    source.check_agrees(model, folder)
    check_generation(folder, config)
    tokenizer = None
    if not partial or _has(folder, "tokenizer.json", "tokenizer_config.json"):
        tokenizer = load_tokenizer(folder)
        _check_tokenizer(recipe, tokenizer)
    if not partial or _has(folder, source.SINGLE, source.INDEX):
        check_tensors(HFFolder(folder), config)
    return tokenizer


def _check_tokenizer(recipe: Recipe, tokenizer: object) -> None:
    """Raises RecipeError for a task, stops or a warm start that are not for this tokenizer."""
    if isinstance(recipe.task, Problems):
        templates.check(recipe.task, tokenizer)
    if "" in recipe.rollout.stop:
        raise RecipeError(
            "rollout.stop: '' would end every response after its first token: remove it"
        )
    if recipe.warm_start is not None and tokenizer.eos_token_id is None:
        raise RecipeError(
            "warm_start: the model's tokenizer has no eos_token to end answers with; set it in its "
            "tokenizer_config.json"
        )


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)
