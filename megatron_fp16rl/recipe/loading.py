"""YAML in, a checked recipe out; errors name file, key, value and remedy."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_fp16rl.recipe import notation
from megatron_fp16rl.recipe.recipe import Recipe
from megatron_fp16rl.recipe.section import RecipeError, Section
from megatron_fp16rl.recipe.tasks import (
    AdditionTask,
    DatasetTask,
    ExactReward,
    FunctionReward,
    HttpReward,
    MathVerifyReward,
    ReasoningGymTask,
    RegexReward,
)

# Tags of the discriminated unions. No key has such a name.
_KINDS: dict[object, type[Section]] = {
    "addition": AdditionTask,
    "dataset": DatasetTask,
    "reasoning_gym": ReasoningGymTask,
    "math_verify": MathVerifyReward,
    "exact": ExactReward,
    "regex": RegexReward,
    "function": FunctionReward,
    "http": HttpReward,
}


Layer = dict[str, Any]  # keys as they are written, references not looked up


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, inherits, overrides and checks a recipe.

    overrides: "a.b=value", the value in YAML. Raises RecipeError.
    """
    layers = _layers(Path(path))
    given = [(f"--set {override}", _parse_override(override)) for override in overrides]
    changes: Layer = {}
    # What is given with --set is one layer: its order means nothing where keys differ.
    for where, layer in given:
        changes = _merge(changes, layer, where)
    merged: Layer = {}
    for where, layer in (*layers, (" ".join(where for where, _ in given), changes)):
        merged = _merge(_give_way(merged, layer), layer, where)
    layers += given
    try:
        values = notation.resolve(merged)
    except notation.BadReference as error:
        raise RecipeError(
            f"{_last_with(error.keys, layers)}: {'.'.join(error.keys)}: {error}"
        ) from None
    values.setdefault("name", Path(path).stem)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, layers)) from None
    for keys in _flags_taken_for_numbers(values, recipe):
        where = f"{_last_with(keys, layers)}: {'.'.join(keys)}"
        raise RecipeError(f"{where}: a number is wanted, not true or false")
    return recipe


def _flags_taken_for_numbers(given: Any, taken: Any) -> Iterator[list[str]]:
    """Keys at which pydantic made 1 of true or 0 of false."""
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield []
    if isinstance(given, dict):
        inner = taken if isinstance(taken, dict) else vars(taken)
        parts = [(key, value, inner[key]) for key, value in given.items()]
    elif isinstance(given, list):
        parts = [(str(i), *pair) for i, pair in enumerate(zip(given, taken, strict=True))]
    else:
        parts = []
    for key, *pair in parts:
        yield from ([key, *keys] for keys in _flags_taken_for_numbers(*pair))


def _merge(below: Layer, above: Layer, where: str, at: str = "") -> Layer:
    """Raises RecipeError where one has a list and the other has keys. where: `above` is written."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            value = _merge(under, value, where, f"{at}{key}.")
        elif {type(value), type(under)} == {list, dict}:
            raise RecipeError(
                f"{where}: {at}{key} is given both as a list and by keys. A list is replaced whole, its items "
                "cannot be changed one by one: --set 'gates=[{metric: grad/norm, above: 10}]'"
            )
        merged[key] = value
    return merged


def _layers(path: Path, children: tuple[Path, ...] = ()) -> list[tuple[str, Layer]]:
    """(where it is written, values) of a recipe and of its bases, the oldest ancestor first."""
    where = str(path)
    try:
        if path.resolve() in children:
            raise RecipeError(f"{where}: base: leads back to this file")
        layer = notation.read_file(path)
    except RecipeError as error:
        raise RecipeError(f"{children[-1]}: base: {error}" if children else str(error)) from None
    if isinstance(model := layer.get("model"), dict) and model.get("shape"):
        shape = path.parent / _path_in(layer, model["shape"], f"{where}: model.shape")
        layer["model"] = {**model, "shape": notation.escape(str(shape.resolve()))}
    ancestors = []
    if layer.get("base") is not None:
        base = path.parent / _path_in(layer, layer["base"], f"{where}: base")
        ancestors = _layers(base, (*children, path.resolve()))
    return [*ancestors, (where, _normalise(layer))]


def _path_in(layer: Layer, text: Any, what: str) -> str:
    """A path that is seen from the file of a layer. Raises RecipeError."""
    try:
        path = notation.resolve_text(text, layer) if isinstance(text, str) else text
    except notation.BadReference as error:
        raise RecipeError(f"{what}: {error}") from None
    if not isinstance(path, str):
        raise RecipeError(f"{what} = {path!r:.100}: the path of a file is wanted")
    return path


_KEY = r"[^\s.\[\]{}$\0\ud800-\udfff]+"
_KEYS = re.compile(rf"{_KEY}(\.{_KEY})*$")


def _parse_override(override: str) -> Layer:
    key, separator, value = override.partition("=")
    if not separator or not _KEYS.match(key):
        raise RecipeError(f"--set {override}: write it as key=value, e.g. --set trainer.steps=3")
    keys = key.split(".")
    layer = notation.read(value, f"--set {override:.200}", keys)
    for name in reversed(keys):
        layer = {name: layer}
    return _normalise(layer)


def _normalise(layer: Layer) -> Layer:
    """`precision: bf16` is short for `precision: {dtype: bf16}`, in every layer."""
    if isinstance(layer.get("precision"), str):
        return {**layer, "precision": {"dtype": layer["precision"]}}
    return layer


# Of a task of one kind, what a task of another takes over. The rest may have the same names, and mean
# something else.
_OF_ALL_KINDS = {"template", "template_options", "max_prompt_tokens", "held_out", "seed"}
_OF_THE_DATA = ("config", "split", "revision", "problem", "answer")


def _give_way(merged: Layer, layer: Layer) -> Layer:
    """What is left of the values so far when a layer's own task has made some of the task's senseless.

    Another `kind` leaves what all kinds have. Data that comes otherwise, from a `path` in place of a
    `name` or the reverse, leaves nothing that described the data before it.
    """
    # As they are written: what ${...} stands for may be in a later layer.
    before, task = merged.get("task"), layer.get("task")
    if not isinstance(before, dict) or not isinstance(task, dict):
        return merged
    kind = task.get("kind", before.get("kind"))
    if kind != before.get("kind"):
        fields = _KINDS[kind].model_fields if isinstance(kind, str) and kind in _KINDS else {}
        gone = before.keys() - (_OF_ALL_KINDS & set(fields))
    elif kind == "dataset" and task.get("path") and before.get("name"):
        gone = {"name", *_OF_THE_DATA}
    elif kind == "dataset" and task.get("name") and before.get("path"):
        gone = {"path", *_OF_THE_DATA}
    else:
        return merged
    return {**merged, "task": {key: value for key, value in before.items() if key not in gone}}


def _explain(error: ValidationError, layers: list[tuple[str, Layer]]) -> str:
    return "\n".join(_explain_one(problem, layers) for problem in error.errors())


def _explain_one(problem: dict, layers: list[tuple[str, Layer]]) -> str:
    keys = _keys_of(problem["loc"])
    where = _where(problem, keys, layers)
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {key!r} is required; add it to the recipe or to its base"
    message = problem["msg"].removeprefix("Value error, ") + _REMEDIES.get(problem["type"], "")
    if not keys:
        return f"{where}: {message}"
    given = problem["input"]
    # Values of the environment may be secret.
    shown = not isinstance(given, dict) and keys[:2] != ["slurm", "environment"]
    return f"{where}: {key}{f' = {given!r:.200}' if shown else ''}: {message}"


_REMEDIES = {
    "string_type": "; write it in quotes if it is text",
    "model_type": "; it has keys of its own",
    "model_attributes_type": "; it has keys of its own",
}


def _keys_of(location: tuple[int | str, ...]) -> list[str]:
    """As the file has them: a discriminated union puts its tag ("addition") behind its key."""
    unions = ("task", "reward")
    return [
        str(part)
        for before, part in zip(("", *location), location, strict=False)
        if not (before in unions and part in _KINDS)
    ]


def _where(problem: dict, keys: list[str], layers: list[tuple[str, Layer]]) -> str:
    """The last layer with a key that the message names, or with the one at fault; else the file."""
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        names = re.findall(
            r"[a-z_]\w*(?:\.\w+)*" if keys else r"[a-z_]\w*(?:\.\w+)+", problem["msg"]
        )
        named = [keys + name.split(".") for name in names]
        if said := [name for name, layer in layers if any(_has(layer, each) for each in named)]:
            return said[-1]
    return _last_with(keys, layers)


def _last_with(keys: Sequence[str], layers: list[tuple[str, Layer]]) -> str:
    """The last layer that has a key; the recipe's file if none has."""
    files = [name for name, _ in layers if not name.startswith("--set ")]
    return next((name for name, layer in reversed(layers) if _has(layer, keys)), files[-1])


def _has(layer: Layer, keys: Sequence[str]) -> bool:
    value: Any = layer
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return bool(keys)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that exist at a location of the recipe."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in _KINDS:
            section = _KINDS[part]
        elif not isinstance(part, int):  # an item of a list
            section = _section_of(section.model_fields[str(part)].annotation)
    return list(section.model_fields)


def _section_of(annotation: object) -> type[BaseModel]:
    """The Section inside an annotation such as `WarmStart | None`."""
    if isinstance(annotation, type):
        return annotation
    return next(a for a in annotation.__args__ if isinstance(a, type) and issubclass(a, BaseModel))
