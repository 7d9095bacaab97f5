"""YAML in, a checked recipe out; errors name file, key, value and remedy."""

import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

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


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, inherits, overrides and checks a recipe.

    overrides: "a.b=value", the value in YAML. Raises RecipeError.
    """
    layers = _layers(Path(path))
    given = [(f"--set {override}", _parse_override(override)) for override in overrides]
    merged = OmegaConf.create({})
    # What is given with --set is one layer: its order means nothing where keys differ.
    changes = functools.reduce(_merge, (layer for _, layer in given), OmegaConf.create({}))
    for layer in (*(layer for _, layer in layers), changes):
        _give_way(merged, layer)
        merged = _merge(merged, layer)
    layers += given
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {error}") from error
    values.setdefault("name", Path(path).stem)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, layers)) from None


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Raises RecipeError where one has a list and the other has keys."""
    try:
        return OmegaConf.merge(below, above)
    except TypeError:
        raise RecipeError(
            f"{_clash(below, above)} is given both as a list and by keys. A list is replaced whole, its "
            "items cannot be changed one by one: --set 'gates=[{metric: grad/norm, above: 10}]'"
        ) from None


def _clash(below: DictConfig, above: DictConfig, at: str = "") -> str:
    """The key at which one has a list and the other keys; "" if there is none."""
    for key in above:
        kinds = [OmegaConf.is_list(above[key]), OmegaConf.is_list(below.get(key))]
        if not (OmegaConf.is_config(above[key]) and OmegaConf.is_config(below.get(key))):
            continue
        if kinds == [False, False]:
            if found := _clash(below[key], above[key], f"{at}{key}."):
                return found
        elif not all(kinds):
            return f"{at}{key}"
    return ""


def _layers(path: Path, children: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """(where it is written, values) of a recipe and of its bases, the oldest ancestor first."""
    if path.resolve() in children:
        raise RecipeError(f"{path}: base: leads back to this file")
    try:
        values = _read_yaml(path.read_text())
        if not isinstance(values, dict):
            raise RecipeError(f"{path} must hold a mapping of recipe sections")
        layer = OmegaConf.create(values)
    except FileNotFoundError:
        origin = f"{children[-1]}: base: " if children else ""
        raise RecipeError(f"{origin}there is no recipe {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if OmegaConf.select(layer, "model.shape"):
        layer.model.shape = str((path.parent / layer.model.shape).resolve())
    base = layer.get("base")
    ancestors = _layers(path.parent / base, (*children, path.resolve())) if base else []
    return [*ancestors, (str(path), _normalise(layer))]


_TEXT = "tag:yaml.org,2002:str"
_CLOCK = (_TEXT, re.compile(r"\d+(:\d+)+$"))


class _Loader(get_yaml_loader()):
    """OmegaConf's YAML, in which 12:00:00 is text: YAML 1.1 takes it for a number in base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [_CLOCK, *rules] for first, rules in _Loader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str, key: str = "") -> object:
    """The value that a recipe has at a key; without one, the whole recipe."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_as_written(node, key))
    finally:
        loader.dispose()


_NO_TEXT = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool")}


def _as_written(node: yaml.Node, key: str) -> yaml.Node:
    """In slurm: numbers, true and false are kept as text: account 012345 is not 5349.

    Those that are numbers to us are read as such later; options of sbatch can be switched on and off.
    """
    if isinstance(node, yaml.MappingNode) and (not key or key.split(".")[0] == "slurm"):
        node.value = [
            (name, _as_written(value, f"{key}.{name.value}" if key else str(name.value)))
            for name, value in node.value
        ]
    elif isinstance(node, yaml.SequenceNode) and key.startswith("slurm."):
        node.value = [_as_written(value, key) for value in node.value]
    elif key.startswith("slurm.") and node.tag in _NO_TEXT:
        is_switch = key.startswith("slurm.options.") and node.tag.endswith("bool")
        if not is_switch:  # a node of its own: an anchor may stand elsewhere too
            return yaml.ScalarNode(_TEXT, node.value)
    return node


def _parse_override(override: str) -> DictConfig:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: write it as key=value, e.g. --set trainer.steps=3")
    layer = OmegaConf.create()
    try:
        OmegaConf.update(layer, key, _read_yaml(value, key))
        return _normalise(layer)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"--set {override}: {error}") from None


def _normalise(layer: DictConfig) -> DictConfig:
    """`precision: bf16` is short for `precision: {dtype: bf16}`, in every layer."""
    if isinstance(layer.get("precision"), str):
        layer.precision = {"dtype": layer.precision}
    return layer


# Of a task of one kind, what a task of another takes over. The rest may have the same names, and mean
# something else.
_OF_ALL_KINDS = {"template", "template_options", "max_prompt_tokens", "held_out", "seed"}
_OF_THE_DATA = ("config", "split", "revision", "problem", "answer")


def _give_way(merged: DictConfig, layer: DictConfig) -> None:
    """Takes from the task so far what a layer's own task makes senseless.

    Another `kind` leaves what all kinds have. Data that comes otherwise, from a `path` in place of a
    `name` or the reverse, leaves nothing that described the data before it.
    """
    # As they are written: what ${...} stands for may be in a later layer.
    before, task = (OmegaConf.to_container(values).get("task") for values in (merged, layer))
    if not isinstance(before, dict) or not isinstance(task, dict):
        return
    kind = task.get("kind", before.get("kind"))
    if kind != before.get("kind"):
        fields = _KINDS[kind].model_fields if isinstance(kind, str) and kind in _KINDS else {}
        gone = before.keys() - (_OF_ALL_KINDS & set(fields))
    elif kind == "dataset" and task.get("path") and before.get("name"):
        gone = {"name", *_OF_THE_DATA}
    elif kind == "dataset" and task.get("name") and before.get("path"):
        gone = {"path", *_OF_THE_DATA}
    else:
        return
    for key in gone:
        merged.task.pop(key, None)


def _explain(error: ValidationError, layers: list[tuple[str, DictConfig]]) -> str:
    return "\n".join(_explain_one(problem, layers) for problem in error.errors())


def _explain_one(problem: dict, layers: list[tuple[str, DictConfig]]) -> str:
    # A discriminated union puts its tag ("addition") into the location; the file does not have it.
    keys = [str(part) for part in problem["loc"] if part not in _KINDS]
    where = _where(problem, keys, layers)
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {key!r} is required; add it to the recipe or to its base"
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        return f"{where}: {message}"
    given = problem["input"]
    value = "" if isinstance(given, dict) else f" = {given!r}"
    return f"{where}: {key}{value}: {message}"


def _where(problem: dict, keys: list[str], layers: list[tuple[str, DictConfig]]) -> str:
    """The last layer with a key that the message names, or with the one at fault; else the file."""
    named = [keys]
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        names = re.findall(
            r"[a-z_]\w*(?:\.\w+)*" if keys else r"[a-z_]\w*(?:\.\w+)+", problem["msg"]
        )
        named = [*(keys + name.split(".") for name in names), keys]
        said = [name for name, layer in layers if any(_has(layer, each) for each in named[:-1])]
        if said:
            return said[-1]
    files = [name for name, _ in layers if not name.startswith("--set ")]
    return next((name for name, layer in reversed(layers) if _has(layer, keys)), files[-1])


def _has(layer: DictConfig, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(layer, DictConfig) or key not in layer:
            return False
        layer = layer[key]
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
