"""Recipes key by key."""

from collections.abc import Iterator
from typing import Any

from megatron_fp16rl.recipe.schema import Recipe
from megatron_fp16rl.recipe.values import HIDDEN

_ABSENT = "(absent)"


def flat(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys and values of a resolved recipe, without `base`."""

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, value

    return dict(walk(recipe.model_dump(mode="json", exclude={"base"}), ""))


def difference(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; "(absent)" where a recipe has no such key.

    Values of slurm.environment may be secret, and are not shown.
    """
    left, right = flat(one), flat(other)
    pairs = {key: (left.get(key, _ABSENT), right.get(key, _ABSENT)) for key in {**left, **right}}
    return {key: (_shown(key, a), _shown(key, b)) for key, (a, b) in pairs.items() if a != b}


def _shown(key: str, value: Any) -> Any:
    is_secret = key.startswith("slurm.environment.") and value is not _ABSENT
    return HIDDEN if is_secret else value
