"""YAML in, a checked recipe out; errors name file, key, value and remedy."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_fp16rl.recipe import notation
from megatron_fp16rl.recipe.schema import Recipe
from megatron_fp16rl.recipe.tasks import Problems, Task
from megatron_fp16rl.recipe.values import RecipeError, Section, kind_of, sections_in

Keys = dict[str, Any]
_MAX_BASES = 20
_MAX_ERRORS = 20  # that are told at once


class Layer(NamedTuple):
    """Keys as they are written, and where: a file or --set."""

    where: str
    keys: Keys


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, its bases and its overrides, and checks what they come to.

    overrides: "a.b=value", the value in YAML or, of a key that wants text, as it is. Raises RecipeError.
    """
    files = _files(Path(path))
    # All --set are one layer: their order means nothing where keys differ.
    changes: Keys = {}
    for override in overrides:
        changes = _merge(changes, _setting(override))
    layers = [*files, Layer("--set", changes)]
    merged: Keys = {}
    for layer in layers:
        merged = _merge(_without_replaced_task(merged, layer.keys), layer)
    merged.setdefault("name", Path(path).stem)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        # Of a key that may be one of several types there is an error for each.
        messages: dict[str, str] = {}
        for problem in error.errors()[:_MAX_ERRORS]:
            place, message = _explain(problem, merged, layers)
            messages[place] = f"{messages[place]}; or {message}" if place in messages else message
        raise RecipeError("\n".join(map("".join, messages.items()))) from None


# Layers.


def _files(path: Path, children: tuple[Path, ...] = ()) -> list[Layer]:
    """A recipe's file and its bases, the oldest ancestor first."""
    try:
        if path.resolve() in children:
            raise RecipeError(f"{path}: base: leads back to this file")
        if len(children) > _MAX_BASES:
            raise RecipeError(
                f"{path}: base: more than {_MAX_BASES} recipes inherit from each other"
            )
        keys = notation.read_file(path)
    except RecipeError as error:
        raise RecipeError(f"{children[-1]}: base: {error}" if children else str(error)) from None
    if isinstance(model := keys.get("model"), dict) and model.get("shape"):
        shape = _path_beside(path, "model.shape", model["shape"]).resolve()
        keys["model"] = {**model, "shape": str(shape)}
    bases = []
    if keys.get("base") is not None:
        bases = _files(_path_beside(path, "base", keys["base"]), (*children, path.resolve()))
    return [*bases, Layer(str(path), _with_long_precision(keys))]


def _path_beside(file: Path, key: str, text: Any) -> Path:
    """The path that a key of a file names, seen from that file."""
    if not isinstance(text, str):
        raise RecipeError(f"{file}: {key} = {text!r:.100}: the path of a file is wanted")
    return file.parent / os.path.expanduser(text)


_KEY = r"[^\s.\[\]{}$\0\ud800-\udfff]+"
_KEYS = re.compile(rf"{_KEY}(\.{_KEY}){{0,50}}$")


def _setting(override: str) -> Layer:
    """The layer of one --set."""
    key, separator, text = override.partition("=")
    if not separator or not _KEYS.match(key):
        raise RecipeError(f"--set {override}: write it as key=value, e.g. --set trainer.steps=3")
    names, where = key.split("."), f"--set {override:.200}"
    if names[0] == "base":
        raise RecipeError(f"{where}: base: stands in a file; give that file as the recipe")
    value = notation.read(_typed(text, names), where, names)
    for name in reversed(names):
        value = {name: value}
    return Layer(f"--set {override}", _with_long_precision(value))


def _typed(text: str, names: Sequence[str]) -> str:
    """The YAML of a value on the command line: of a key that wants text, the text as it was typed.

    The shell has taken the quotes that 1.10 or "a #b" has in a file. Text that still begins with a quote
    is YAML.
    """
    types = _types(names)
    if str not in types or text.startswith(("'", '"')):
        return text
    kinds = {int: ["int"], bool: ["bool"], float: ["float", "ambiguous"], type(None): ["null"]}
    others = [kind for type_ in types for kind in kinds.get(type_, [])]
    return text if notation.kind_of_plain(text) in others else notation.inline(text)


def _types(names: Sequence[str]) -> set[Any]:
    """The types that a key admits; none if it is unknown."""
    annotation: Any = Recipe
    for name in names:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            continue
        sections = sections_in(annotation)
        fields = [each.model_fields[name] for each in sections if name in each.model_fields]
        if not fields:
            return set()
        annotation = fields[0].annotation
    return _alternatives(annotation)


def _alternatives(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {each for part in get_args(annotation) for each in _alternatives(part)}
    return {annotation}


def _with_long_precision(keys: Keys) -> Keys:
    """`precision: bf16` is short for `precision: {dtype: bf16}`, in every layer."""
    if isinstance(keys.get("precision"), str):
        return {**keys, "precision": {"dtype": keys["precision"]}}
    return keys


def _merge(below: Keys, above: Layer, prefix: str = "") -> Keys:
    """The keys of `above` over those of `below`; sections key by key, lists whole."""
    merged = dict(below)
    for key, value in above.keys.items():
        under = merged.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            value = _merge(under, Layer(above.where, value), f"{prefix}{key}.")
        elif {type(value), type(under)} == {list, dict}:
            raise RecipeError(
                f"{above.where}: {prefix}{key} is given both as a list and by keys. A list is replaced "
                "whole, its items cannot be changed one by one: "
                "--set 'gates=[{metric: grad/norm, above: 10}]'"
            )
        merged[key] = value
    return merged


_TASKS = {kind_of(section): section for section in get_args(Task)}
# What a task of another kind takes over. Other keys may have the same name, and mean something else.
_KEPT = {*Problems.model_fields} - {"instruction"}
_OF_THE_DATA = {"path", "name", "config", "split", "revision", "problem", "answer"}


def _without_replaced_task(below: Keys, above: Keys) -> Keys:
    """The keys below without those of a task that `above` replaces.

    Another `kind` keeps only what all kinds have. Another source of data, a `path` in place of a `name` or
    the reverse, drops what described the data before it.
    """
    before, after = below.get("task"), above.get("task")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return below
    old_kind = before.get("kind")
    kind = after.get("kind", old_kind)
    dropped: set[str] = set()
    if kind != old_kind:
        section = _TASKS.get(kind) if isinstance(kind, str) else None
        dropped = before.keys() - (_KEPT & set(section.model_fields if section else ()))
    elif kind == "dataset" and (
        (after.get("path") and before.get("name")) or (after.get("name") and before.get("path"))
    ):
        dropped = _OF_THE_DATA
    return {**below, "task": {key: v for key, v in before.items() if key not in dropped}}


# Errors.

_REMEDIES = {
    "string_type": "; write it in quotes if it is text",
    "model_type": "; it has keys of its own",
    "model_attributes_type": "; it has keys of its own",
}


def _explain(problem: ErrorDetails, merged: Keys, layers: list[Layer]) -> tuple[str, str]:
    """One of pydantic's errors as: where, key and value; and what is wrong, with the remedy."""
    keys, section = _place(problem, merged)
    # The last that has the key. An error about several keys is the recipe's, whose file is the last.
    files = [layer.where for layer in layers if layer.where != "--set"]
    where = next((layer.where for layer in reversed(layers) if _has(layer.keys, keys)), files[-1])
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], section.model_fields, n=1, cutoff=0.5)
        known = ", ".join(sorted(section.model_fields))
        return f"{where}: unknown key {key[:200]!r}; ", (
            f"did you mean {near[0]!r}?" if near else f"known keys: {known}"
        )
    if problem["type"] == "missing":
        return f"{where}: {key!r} ", "is required; add it to the recipe or to its base"
    message = problem["msg"].removeprefix("Value error, ") + _REMEDIES.get(problem["type"], "")
    value = problem["input"]
    if isinstance(value, dict):  # about several keys: the message names them
        return f"{files[-1]}: {key}{': ' if key else ''}", message
    # Values of the environment may be secret.
    shown = "" if keys[:2] == ["slurm", "environment"] else f" = {value!r:.200}"
    return f"{where}: {key}{shown}: ", message


def _place(problem: ErrorDetails, merged: Keys) -> tuple[list[str], type[Section]]:
    """Keys as the file has them, and the section of the last.

    In pydantic's location what it took a value for follows the value's key: the kind of a task, or a type.
    """
    keys: list[str] = []
    section: type[Section] = Recipe
    inner: list[type[Section]] = [Recipe]
    value: Any = merged
    for part in problem["loc"]:
        tagged = next((each for each in inner if len(inner) > 1 and kind_of(each) == part), None)
        if tagged is not None:
            inner = [tagged]
            continue
        is_item = isinstance(value, list) and isinstance(part, int)
        if is_item or (isinstance(value, dict) and part in value):
            value = value[part]
        elif problem["type"] != "missing":
            continue
        keys.append(str(part))
        if isinstance(part, str) and len(inner) == 1:
            section = inner[0]
            field = section.model_fields.get(part)
            inner = sections_in(field.annotation) if field else []
    return keys, section


def _has(value: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return False
    return bool(keys)
