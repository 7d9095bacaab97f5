"""The recipes that ship, and what users make of them: listed, compared, forked, put on other nodes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import ValidationError

from megatron_fp16rl.files import write_text
from megatron_fp16rl.recipe import Algorithm, Layout, Recipe, RecipeError, load

RECIPES = Path(__file__).parent.parent / "recipes"
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Entry:
    """A recipe that is a run by itself. path: below recipes/. billions: parameters; None if unknown."""

    path: str
    recipe: Recipe
    billions: float | None


def paths() -> list[Path]:
    """The files of all recipes but those that are only bases of others."""
    found = sorted(RECIPES.rglob("*.yaml"))
    return [path for path in found if path.stem != "base" and not path.stem.endswith("-base")]


def entries() -> Iterator[Entry]:
    """All recipes that ship, by path."""
    for path in paths():
        recipe = load(path)
        yield Entry(str(path.relative_to(RECIPES)), recipe, _billions(recipe))


def find(name: str) -> Path:
    """The file of a recipe, given by its path or by its name in the catalogue. Raises RecipeError."""
    if Path(name).is_file():
        return Path(name)
    for path in paths():
        if name in (
            path.stem,
            str(path.relative_to(RECIPES)),
            str(path.relative_to(RECIPES.parent)),
        ):
            return path
    raise RecipeError(f"there is no recipe {name}: neither a file nor one of `fp16rl recipes list`")


def _billions(recipe: Recipe) -> float | None:
    from megatron_fp16rl.planner.arithmetic import costs
    from megatron_fp16rl.weights.build import model_config

    try:
        return costs(model_config(recipe.model)).parameters / 1e9
    except RecipeError:  # its weights are not here, and it has no shape
        return None


def algorithm_in_short(algorithm: Algorithm) -> str:
    """For a table, e.g. "grpo + sequence mask"."""
    words = [algorithm.advantage]
    if algorithm.loss != "ppo_clip":
        words.append(algorithm.loss)
    if algorithm.overlong is not None:
        words.append("overlong")
    if algorithm.correction is not None:
        words.append(f"{algorithm.correction.ratio} {algorithm.correction.action}")
    return " + ".join(words)


def layout_in_short(layout: Layout) -> str:
    """For a table, e.g. "TP4 PP2 EP8 DP4"."""
    sizes = {
        "TP": layout.tensor_parallel,
        "PP": layout.pipeline_parallel,
        "EP": layout.expert_parallel,
        "DP": layout.data_parallel,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"


def nodes(recipe: Recipe) -> int | None:
    """Of the whole job; None for a recipe without slurm:."""
    return recipe.slurm.learner_nodes + recipe.slurm.rollout_nodes if recipe.slurm else None


def on_nodes(recipe: Recipe, wanted: int) -> Recipe:
    """The recipe on `wanted` nodes in all: more or fewer replicas and servers, the same layout of each.

    Raises RecipeError where that cannot be, with the nearest numbers of nodes that can.
    """
    return _changed(recipe, for_nodes(recipe, wanted))


def for_nodes(recipe: Recipe, wanted: int) -> dict[str, int]:
    """Keys and values with which a recipe takes `wanted` nodes. Raises RecipeError as `on_nodes`.

    Of the ways to share the nodes out, the one nearest to the recipe's own that makes a valid recipe.
    """
    if recipe.slurm is None:
        raise RecipeError(f"{recipe.name} has no slurm: section that would say what its nodes are")
    changes, reason = _choose(recipe, wanted)
    if changes:
        return changes
    around = range(1, 2 * wanted + 2 * nodes(recipe))
    good = [n for n in around if _choose(recipe, n)[0]]
    nearest = sorted(sorted(good, key=lambda n: abs(n - wanted))[:3])
    raise RecipeError(
        f"{recipe.name} cannot be put on {wanted} node(s): {reason}. Nearest numbers that can: "
        f"{', '.join(map(str, nearest))}"
    )


def _choose(recipe: Recipe, wanted: int) -> tuple[dict[str, int], str]:
    """The changes, or none and why the first choice would not do."""
    reasons = ["it has nodes that learn and nodes that sample"]
    for changes in _ways(recipe, wanted):
        try:
            _changed(recipe, changes)
        except ValidationError as error:
            reasons.append(error.errors()[0]["msg"].removeprefix("Value error, "))
        else:
            return changes, ""
    return {}, reasons[1] if len(reasons) > 1 else reasons[0]


def _ways(recipe: Recipe, wanted: int) -> Iterator[dict[str, int]]:
    """Ways to share nodes out, the recipe's own proportion first; ranks and servers fill their nodes."""
    slurm, ranks, servers = recipe.slurm, recipe.learner.ranks, recipe.rollout.servers
    had, sampled = slurm.learner_nodes, slurm.rollout_nodes
    if sampled:
        share = had * wanted / (had + sampled)
        splits = sorted(range(1, wanted), key=lambda n: (abs(n - share), -n))
    else:
        splits = [wanted]
    for learns in splits:
        samples = wanted - learns
        of_servers = (samples, sampled) if sampled else (learns, had)
        if ranks * learns % had or servers * of_servers[0] % of_servers[1]:
            continue
        yield {
            "slurm.learner_nodes": learns,
            "slurm.rollout_nodes": samples,
            "learner.ranks": ranks * learns // had,
            "rollout.servers": servers * of_servers[0] // of_servers[1],
        }


def _changed(recipe: Recipe, changes: dict[str, int]) -> Recipe:
    """Raises ValidationError."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Recipe.model_validate(values)


def flat(recipe: Recipe) -> dict[str, object]:
    """Dotted keys and values of a resolved recipe, without `base`."""

    def walk(value: object, prefix: str) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, value

    return dict(walk(recipe.model_dump(mode="json", exclude={"base"}), ""))


def difference(one: Recipe, other: Recipe) -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ, with both values; "(absent)" where one recipe has no such key."""
    left, right = flat(one), flat(other)
    keys = [*left, *(key for key in right if key not in left)]
    pairs = {key: (left.get(key, _ABSENT), right.get(key, _ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def fork(
    path: Path, source: Path, name: str | None, wanted: int | None, model: str | None
) -> Recipe:
    """Writes a child recipe of `source`, commented, and returns it resolved.

    wanted: nodes. model: folder or name. Raises RecipeError, and leaves nothing behind, if the file is
    there or the child cannot be.
    """
    if path.exists():
        raise RecipeError(f"{path} is there already: choose another name, or remove it")
    parent = load(source)
    changes: dict[str, object] = {"name": name or path.stem}
    if wanted is not None:
        changes |= for_nodes(parent, wanted)
    if model is not None:
        changes["model.path"] = model
        if parent.model.build is not None:
            raise RecipeError(
                f"{source}: its model is built on the spot; --model cannot replace it"
            )
        if (Path(model).expanduser() / "config.json").exists():
            changes["model.path"] = str(Path(model).expanduser().resolve())
            changes["model.shape"] = None  # the folder tells
    base = os.path.relpath(source.resolve(), path.resolve().parent)
    write_text(path, _text(parent, base, changes))
    try:
        return load(path)
    except RecipeError:
        path.unlink()
        raise


def _text(parent: Recipe, base: str, changes: dict[str, object]) -> str:
    values = OmegaConf.create({})
    for key, value in changes.items():
        OmegaConf.update(values, key, value)
    rollout, learner = parent.rollout, parent.learner
    return f"""\
# A fork of {parent.name}: what is written here wins over `base:`, whose keys are all inherited.
#   what it comes to      fp16rl recipes diff {base} THIS_FILE
#   whether it fits       fp16rl plan THIS_FILE
#   a small copy, here    fp16rl rehearse THIS_FILE
#   into the queue        fp16rl submit THIS_FILE --dry-run
base: {base}
{OmegaConf.to_yaml(values)}
# Often changed; the values are those of the base.
# task: {{path: my-problems.jsonl, name: null, config: null}} # {{"problem": ..., "answer": ...}} a line
# rollout: {{prompts: {rollout.prompts}, samples: {rollout.samples}, max_new_tokens: {rollout.max_new_tokens}}}
# learner: {{micro_batch_tokens: {learner.micro_batch_tokens}, optimizer: {{lr: {learner.optimizer.lr:.1e}}}}}
# precision: bf16
# slurm: {{account: ..., partition: ..., time: "24:00:00"}}
provenance: {{algorithm: "ours: a fork of {parent.name}", layout: "ours: a fork of {parent.name}"}}
"""
