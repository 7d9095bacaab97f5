"""The recipes that ship: found by name, listed, and forked."""

import contextlib
import difflib
import itertools
import math
import os
from pathlib import Path
from typing import Any

from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.source import local_folder, shape_beside
from megatron_fp16rl.recipe import Algorithm, Layout, Recipe, RecipeError, load, notation
from megatron_fp16rl.utils.files import write_text

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def paths() -> list[Path]:
    """The files of all recipes but those that are only bases of others."""
    files = sorted(RECIPES.rglob("*.yaml"))
    return [path for path in files if path.stem != "base" and not path.stem.endswith("-base")]


def find(name: str) -> Path:
    """The file of a recipe: a path, its name in the list with or without folder, or its runs' name.

    Raises RecipeError.
    """
    with contextlib.suppress(OSError):  # too long, or in a folder that we may not read
        if Path(name).is_file():
            return Path(name)
    short = name.removeprefix(f"{RECIPES.name}/").removesuffix(".yaml")
    files = paths()
    named = (p for p in files if short in (p.stem, str(p.relative_to(RECIPES).with_suffix(""))))
    if path := next(named, None) or next((p for p in files if load(p).name == short), None):
        return path
    near = difflib.get_close_matches(short, [path.stem for path in files], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"there is no recipe {name:.200}: neither a file nor one of `fp16rl recipes list`{hint}"
    )


def listing() -> list[dict[str, Any]]:
    """All recipes that ship, by path; parameters_b in billions, None where the model is not known."""
    return [
        {
            "name": recipe.name,
            "path": str(path.relative_to(RECIPES)),
            "model": recipe.model.path or "built here",
            "parameters_b": _billions(recipe),
            "algorithm": _algorithm(recipe.algorithm),
            "nodes": recipe.slurm.nodes if recipe.slurm else None,
            "gpus_per_node": recipe.slurm.gpus_per_node if recipe.slurm else None,
            "layout": layout(recipe.learner),
            "provenance": recipe.provenance.model_dump() if recipe.provenance else None,
        }
        for path, recipe in ((path, load(path)) for path in paths())
    ]


def _billions(recipe: Recipe) -> float | None:
    from megatron_fp16rl.models.costs import costs

    try:
        return round(costs(model_config(recipe.model)).parameters / 1e9, 6)
    except RecipeError:  # its weights are not here, and it has no shape
        return None


def _algorithm(algorithm: Algorithm) -> str:
    """E.g. "grpo + sequence mask"."""
    words: list[str] = [algorithm.advantage]
    if algorithm.loss != "ppo_clip":
        words.append(algorithm.loss)
    if algorithm.overlong is not None:
        words.append("overlong")
    if algorithm.correction is not None:
        words.append(f"{algorithm.correction.ratio} {algorithm.correction.action}")
    return " + ".join(words)


def layout(learner: Layout) -> str:
    """E.g. "TP4 PP2 EP8 DP4"."""
    sizes = {
        "TP": learner.tensor_parallel,
        "PP": learner.pipeline_parallel,
        "CP": learner.context_parallel,
        "EP": learner.expert_parallel,
        "DP": learner.data_parallel,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"


def new(path: Path, source: Path, overrides: list[str]) -> Recipe:
    """Writes a recipe that inherits from `source`, with `overrides` as its own keys; returns it resolved.

    overrides: as for --set. Raises RecipeError, and leaves no file, if the path is taken or the recipe
    is not valid.
    """
    if path.exists():
        raise RecipeError(f"{path} is there already: choose another name, or remove it")
    for override in overrides:
        if "${" in override:  # its value now would be written, and it may be a secret
            raise RecipeError(f"--set {override}: write a reference into {path} by hand")
    resolved = load(source, overrides)
    own = _own_keys(resolved, overrides)
    model = own.get("model", {})
    if shape := model.get("shape"):  # a file's shape is seen from that file
        model["shape"] = str(Path(shape).resolve())
    elif name := model.get("path"):
        shape = resolved.model.shape
        if local_folder(name) is not None:
            model["shape"] = None  # the folder tells its own
        elif shape is not None and (known := shape_beside(shape, name)):
            model["shape"] = str(known.resolve())
    origin = f"ours: a fork of {load(source).name}"
    head: dict[str, Any] = {"base": os.path.relpath(source.resolve(), path.resolve().parent)}
    head |= {"name": path.stem, "provenance": {"algorithm": origin, "layout": origin}}
    try:
        write_text(path, _HEAD + notation.write(head | own))
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error}; choose another place") from None
    try:
        return load(path)
    except RecipeError:
        path.unlink()
        raise


def on_nodes(source: Path, overrides: list[str], count: int) -> list[str]:
    """Overrides with which a recipe takes `count` nodes: ranks and servers grow or shrink with them.

    Learner and servers keep their shares of the nodes. Raises RecipeError, with the nearest counts that
    the recipe can take, if it cannot take this one.
    """
    recipe = load(source, overrides)
    if recipe.slurm is None:
        raise RecipeError(f"--nodes {count}: {source} has no slurm: section")
    sizes = {
        "slurm.learner_nodes": recipe.slurm.learner_nodes,
        "slurm.rollout_nodes": recipe.slurm.rollout_nodes,
        "learner.ranks": recipe.learner.ranks,
        "rollout.servers": recipe.rollout.servers,
    }
    total = recipe.slurm.nodes
    step = total // math.gcd(total, *sizes.values())

    def settings(nodes: int) -> list[str]:
        return [f"{key}={size * nodes // total}" for key, size in sizes.items()]

    def is_valid(nodes: int) -> bool:
        with contextlib.suppress(RecipeError):
            return bool(load(source, [*overrides, *settings(nodes)]))
        return False

    if count % step or not is_valid(count):
        by_distance = sorted(range(step, 8 * total + 1, step), key=lambda n: abs(n - count))
        nearest = sorted(itertools.islice(filter(is_valid, by_distance), 3))
        raise RecipeError(
            f"--nodes {count}: {source.stem} and its batch do not divide evenly; the nearest numbers that "
            f"do: {', '.join(map(str, nearest))}"
        )
    return settings(count)


_HEAD = """\
# What is written here wins over `base:`, whose other keys are all inherited.
#   whether it fits       fp16rl plan THIS_FILE
#   a small copy, here    fp16rl rehearse THIS_FILE
#   into the queue        fp16rl submit THIS_FILE --dry-run
"""


def _own_keys(recipe: Recipe, overrides: list[str]) -> dict[str, Any]:
    """The keys that `overrides` set, nested as in a file, with the recipe's values."""
    values, own = recipe.model_dump(mode="json"), dict[str, Any]()
    for override in overrides:
        *sections, name = override.partition("=")[0].split(".")
        value, target = values, own
        for section in sections:
            value, target = value[section], target.setdefault(section, {})
        target[name] = value[name]
    return own
