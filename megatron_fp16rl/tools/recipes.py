"""The recipes that ship: found by name, listed, compared, and forked for other models or nodes."""

import contextlib
import difflib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.source import local_folder, shape_beside
from megatron_fp16rl.recipe import Algorithm, Layout, Recipe, RecipeError, load, notation
from megatron_fp16rl.utils.files import write_text

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_NEAREST = 3  # numbers of nodes that an error names
# Keys that users change most: a fork has them as comments.
_OFTEN_CHANGED = (
    "model.path",
    *(f"task.{key}" for key in ("path", "name", "config", "problem", "answer", "template")),
    *("rollout.samples", "rollout.max_new_tokens"),
    *("learner.micro_batch_tokens", "learner.optimizer.lr"),
    "precision.dtype",
    "trainer.steps",
    *("slurm.options", "slurm.time"),
)


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
    named = (path for path in files if short in (path.stem, _title(path)))
    if path := next(named, None) or next((p for p in files if load(p).name == short), None):
        return path
    near = difflib.get_close_matches(short, [path.stem for path in files], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"there is no recipe {name:.200}: neither a file nor one of `fp16rl recipes list`{hint}"
    )


def _title(path: Path) -> str:
    """The name of one of `paths()` in the list, e.g. "tiny/dense-grpo-fp16"."""
    return str(path.relative_to(RECIPES)).removesuffix(".yaml")


def listing() -> list[dict[str, Any]]:
    """All recipes that ship, by path; parameters_b in billions, None where the model is not known."""
    rows = []
    for path in paths():
        recipe = load(path)
        slurm, provenance = recipe.slurm, recipe.provenance
        rows.append(
            {
                "name": recipe.name,
                "path": str(path.relative_to(RECIPES)),
                "model": recipe.model.path or "built here",
                "parameters_b": _billions(recipe),
                "algorithm": _algorithm(recipe.algorithm),
                "nodes": nodes(recipe),
                "gpus_per_node": slurm.gpus_per_node if slurm else None,
                "layout": layout(recipe.learner),
                "provenance": provenance.model_dump() if provenance else None,
            }
        )
    return rows


def _billions(recipe: Recipe) -> float | None:
    from megatron_fp16rl.tools.plan.costs import costs

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
        "EP": learner.expert_parallel,
        "DP": learner.data_parallel,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"


def nodes(recipe: Recipe) -> int | None:
    """Nodes of the whole job; None for a recipe without slurm:."""
    return recipe.slurm.learner_nodes + recipe.slurm.rollout_nodes if recipe.slurm else None


# Other numbers of nodes


def on_nodes(recipe: Recipe, count: int) -> Recipe:
    """The recipe on `count` nodes: more or fewer replicas and servers, each with the same layout.

    Raises RecipeError where that cannot be, with the nearest numbers of nodes that can.
    """
    return _changed(recipe, for_nodes(recipe, count))


def for_nodes(recipe: Recipe, count: int) -> dict[str, int]:
    """Keys and values that put a recipe on `count` nodes in all. Raises RecipeError as `on_nodes`.

    Takes the split between learner and servers that is nearest to the recipe's own and makes a valid
    recipe. Neither gets half its share or less, nor twice its share or more.
    """
    own = nodes(recipe)
    if own is None:
        raise RecipeError(f"{recipe.name} has no slurm: section that would say what its nodes are")
    changes, reason = _best_split(recipe, count)
    if changes is not None:
        return changes
    # A data-parallel rank takes at least a prompt, which bounds the learner's nodes.
    learner = recipe.learner
    most_ranks = recipe.rollout.prompts * learner.tensor_parallel * learner.pipeline_parallel
    most_nodes = min(count + 2 * own, 2 * own * most_ranks // learner.ranks)
    nearest: list[int] = []
    for near in sorted(range(1, most_nodes + 1), key=lambda n: abs(n - count)):
        if len(nearest) < _NEAREST and _best_split(recipe, near)[0] is not None:
            nearest.append(near)
    raise RecipeError(
        f"{recipe.name} cannot be put on {count} node(s): {reason}. Nearest numbers that can: "
        f"{', '.join(map(str, sorted(nearest)))}"
    )


def _best_split(recipe: Recipe, count: int) -> tuple[dict[str, int] | None, str]:
    """The changes of the best split; None if there is none, and why the first was refused."""
    reasons = []
    for changes in _splits(recipe, count):
        try:
            _changed(recipe, changes)
        except ValidationError as error:
            reasons.append(error.errors()[0]["msg"].removeprefix("Value error, "))
        else:
            return changes, ""
    reasons.append("learner and servers cannot share them as they share the recipe's own")
    return None, reasons[0]


def _splits(recipe: Recipe, count: int) -> Iterator[dict[str, int]]:
    """Ways to split nodes, the recipe's own proportion first. Ranks and servers fill them as before."""
    slurm, ranks, servers = recipe.slurm, recipe.learner.ranks, recipe.rollout.servers
    assert slurm is not None
    learner, rollout = slurm.learner_nodes, slurm.rollout_nodes
    options = [count]  # servers are on the learner's nodes
    if rollout:
        share = learner * count / (learner + rollout)
        near = (
            n
            for n in range(1, count)
            if n < 2 * share < 4 * n and count - n < 2 * (count - share) < 4 * (count - n)
        )
        options = sorted(near, key=lambda n: (abs(n - share), -n))
    for learners in options:
        rollouts = count - learners
        served_by = (rollouts, rollout) if rollout else (learners, learner)
        if ranks * learners % learner or servers * served_by[0] % served_by[1]:
            continue
        yield {
            "slurm.learner_nodes": learners,
            "slurm.rollout_nodes": rollouts,
            "learner.ranks": ranks * learners // learner,
            "rollout.servers": servers * served_by[0] // served_by[1],
        }


def _changed(recipe: Recipe, changes: dict[str, int]) -> Recipe:
    """Raises ValidationError."""
    values = recipe.model_dump(mode="json")
    for section, keys in _sections(changes).items():
        values[section] |= keys
    return Recipe.model_validate(values)


def _sections(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Keys such as "slurm.learner_nodes", by their sections."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


# Forks


def fork(
    path: Path, source: Path, name: str | None, count: int | None, model: str | None
) -> Recipe:
    """Writes a recipe that inherits from `source`, with comments, and returns it resolved.

    count: nodes in all. model: folder or name. Raises RecipeError, and leaves no file, if the path is
    taken or the recipe is not valid.
    """
    if path.exists():
        raise RecipeError(f"{path} is there already: choose another name, or remove it")
    parent = load(source)
    changes: dict[str, Any] = for_nodes(parent, count) if count is not None else {}
    if model is not None:
        if parent.model.build is not None:
            raise RecipeError(
                f"{source}: its model is built on the spot; --model cannot replace it"
            )
        changes |= _with_model(model, parent.model.shape, path.resolve().parent)
    text = _text(parent, source, path, name or path.stem, changes)
    try:
        write_text(path, text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error}; choose another place") from None
    try:
        return load(path)
    except RecipeError:
        path.unlink()
        raise


def _with_model(model: str, shape: str | None, folder: Path) -> dict[str, Any]:
    """Keys with which a recipe in `folder` takes another model; shape: of the model that it replaces."""
    if local_folder(model) is not None:  # its own config.json tells its shape
        is_folder = Path(model).expanduser().is_dir()
        path = str(Path(model).expanduser().resolve()) if is_folder else model
        return {"model.path": path, "model.shape": None}
    changes: dict[str, Any] = {"model.path": model}
    known = shape_beside(shape, model) if shape else None
    if known is not None:
        changes["model.shape"] = os.path.relpath(known, folder)
    return changes


def _text(parent: Recipe, source: Path, path: Path, name: str, changes: dict[str, Any]) -> str:
    """The file of a fork: what it changes, and comments on what else is often changed."""
    file = source.resolve()
    shown = _title(file) if file in paths() else " ".join(str(source).splitlines())
    inherited = parent.flat()
    often = [key for key in _OFTEN_CHANGED if key in inherited and key not in changes]
    lines = [f"#   {notation.setting(key, inherited[key])}" for key in often]
    origin = f"ours: a fork of {parent.name}"
    head: dict[str, Any] = {"base": os.path.relpath(file, path.resolve().parent), "name": name}
    head |= {"provenance": {"algorithm": origin, "layout": origin}}
    return f"""\
# A fork of {parent.name}: what is written here wins over `base:`, whose keys are all inherited.
#   what it comes to      fp16rl recipes diff {shlex.quote(shown)} THIS_FILE
#   whether it fits       fp16rl plan THIS_FILE
#   a small copy, here    fp16rl rehearse THIS_FILE
#   into the queue        fp16rl submit THIS_FILE --dry-run
{notation.write(head | _sections(changes))}
# Keys that are often changed, with the values of the base. To try one: --set KEY=VALUE
{chr(10).join(lines)}
"""
