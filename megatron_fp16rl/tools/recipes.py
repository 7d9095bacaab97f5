"""The recipes that ship, and what users make of them: listed, compared, forked, put on other nodes."""

import contextlib
import difflib
import itertools
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from megatron_fp16rl.models.source import local_folder, shape_beside
from megatron_fp16rl.recipe import HIDDEN, Algorithm, Layout, Recipe, RecipeError, load, notation
from megatron_fp16rl.utils.files import write_text

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_ABSENT = "(absent)"
# Keys of a task that a fork has as comments, where its kind has them.
_TASK = ("path", "name", "config", "problem", "answer", "template")


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


def _title(path: Path) -> str:
    """What the list calls one of `paths()`, e.g. "tiny/dense-grpo-fp16"."""
    return str(path.relative_to(RECIPES)).removesuffix(".yaml")


def find(name: str) -> Path:
    """The file of a recipe: given by its path, or as the list has it, with or without its folder.

    The name that its runs have will do too. Raises RecipeError.
    """
    with contextlib.suppress(OSError):  # too long, or in a folder that is not ours to look into
        if Path(name).is_file():
            return Path(name)
    wanted = name.removeprefix(f"{RECIPES.name}/").removesuffix(".yaml")
    known = paths()
    named = (path for path in known if wanted in (path.stem, _title(path)))
    found = next(named, None) or next((p for p in known if load(p).name == wanted), None)
    if found is not None:
        return found
    near = difflib.get_close_matches(wanted, [path.stem for path in known], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"there is no recipe {name:.200}: neither a file nor one of `fp16rl recipes list`{hint}"
    )


def _billions(recipe: Recipe) -> float | None:
    from megatron_fp16rl.models.build import model_config
    from megatron_fp16rl.tools.plan.arithmetic import costs

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

    Of the ways to share the nodes out, the one nearest to the recipe's own that makes a valid recipe;
    none in which learning or sampling has half its share or less, or twice that or more.
    """
    if recipe.slurm is None:
        raise RecipeError(f"{recipe.name} has no slurm: section that would say what its nodes are")
    changes, reason = _choose(recipe, wanted)
    if changes:
        return changes
    last = min(wanted + 2 * nodes(recipe), _most(recipe))
    around = sorted(range(1, last + 1), key=lambda n: abs(n - wanted))
    nearest = sorted(itertools.islice((n for n in around if _choose(recipe, n)[0]), 3))
    raise RecipeError(
        f"{recipe.name} cannot be put on {wanted} node(s): {reason}. Nearest numbers that can: "
        f"{', '.join(map(str, nearest))}"
    )


def _most(recipe: Recipe) -> int:
    """A bound on nodes: a data-parallel rank has a prompt at least, and learning half its share."""
    learner = recipe.learner
    ranks = recipe.rollout.prompts * learner.tensor_parallel * learner.pipeline_parallel
    return 2 * nodes(recipe) * ranks // learner.ranks


def _choose(recipe: Recipe, wanted: int) -> tuple[dict[str, int], str]:
    """The changes, or none and why the first choice would not do."""
    reasons = ["they cannot be shared out as its own between learning and sampling"]
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
        near = (
            n
            for n in range(1, wanted)
            if n < 2 * share < 4 * n and wanted - n < 2 * (wanted - share) < 4 * (wanted - n)
        )
        splits = sorted(near, key=lambda n: (abs(n - share), -n))
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
    """Dotted keys whose values differ, with both values; "(absent)" where one recipe has no such key.

    Values of slurm.environment may be secret, and are not shown.
    """
    left, right = flat(one), flat(other)
    keys = [*left, *(key for key in right if key not in left)]
    pairs = {key: (left.get(key, _ABSENT), right.get(key, _ABSENT)) for key in keys}
    return {
        key: tuple(
            HIDDEN if key.startswith("slurm.environment.") and value is not _ABSENT else value
            for value in pair
        )
        for key, pair in pairs.items()
        if pair[0] != pair[1]
    }


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
        if parent.model.build is not None:
            raise RecipeError(
                f"{source}: its model is built on the spot; --model cannot replace it"
            )
        changes |= _as_model(model, parent.model.shape, path.resolve().parent)
    base = os.path.relpath(source.resolve(), path.resolve().parent)
    of = _title(source.resolve()) if source.resolve() in paths() else str(source)
    try:
        write_text(path, _text(parent, of, base, changes))
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error}; choose another place") from None
    try:
        return load(path)
    except RecipeError:
        path.unlink()
        raise


def _as_model(model: str, shape: str | None, folder: Path) -> dict[str, object]:
    """Keys with which a recipe in `folder` takes another model: its shape too, where that is known here.

    shape: of the model that it replaces.
    """
    if local_folder(model) is not None:
        is_folder = Path(model).expanduser().is_dir()
        path = str(Path(model).expanduser().resolve()) if is_folder else model
        return {"model.path": path, "model.shape": None}  # the model tells
    changes: dict[str, object] = {"model.path": model}
    known = shape_beside(shape, model) if shape else None
    if known is not None:
        changes["model.shape"] = os.path.relpath(known, folder)
    return changes


def _text(parent: Recipe, of: str, base: str, changes: dict[str, object]) -> str:
    """A child recipe: changes, and as comments, in their sections, what else is often changed.

    of: the parent, as commands name it; base: the same as the child does.
    """
    rollout, learner, task = parent.rollout, parent.learner, parent.task
    often: dict[str, dict[str, object]] = {
        "model": {"path": parent.model.path},
        "task": {key: getattr(task, key) for key in _TASK if hasattr(task, key)},
        "rollout": {key: getattr(rollout, key) for key in ("samples", "max_new_tokens")},
        "learner": {
            "micro_batch_tokens": learner.micro_batch_tokens,
            "optimizer": {"lr": learner.optimizer.lr},
        },
        "precision": {"dtype": parent.precision.dtype},
        "trainer": {"steps": parent.trainer.steps},
        "slurm": {
            key: getattr(parent.slurm, key, None) for key in ("account", "partition", "time")
        },
    }
    if parent.slurm is None:
        del often["slurm"]
    if parent.model.build is not None:
        del often["model"]
    sections = [_section(name, changes, keys) for name, keys in often.items() if keys]
    provenance = {"algorithm": f"ours: a fork of {parent.name}"}
    provenance["layout"] = provenance["algorithm"]
    return f"""\
# A fork of {parent.name}: what is written here wins over `base:`, whose keys are all inherited.
#   what it comes to      fp16rl recipes diff {_quoted(of)} THIS_FILE
#   whether it fits       fp16rl plan THIS_FILE
#   a small copy, here    fp16rl rehearse THIS_FILE
#   into the queue        fp16rl submit THIS_FILE --dry-run
# Comments are keys that are often changed, with the values of the base.
{notation.write({"base": base, "name": changes["name"]}).rstrip()}
{notation.write({"provenance": provenance})}
{"".join(sections)}"""


def _quoted(path: str) -> str:
    """For a shell, on the one line that a comment is."""
    return shlex.quote(" ".join(path.splitlines()))


def _section(name: str, changes: dict[str, object], often: dict[str, object]) -> str:
    """A section of a child recipe, all of it a comment if nothing in it is changed."""
    own = {k.split(".")[1]: v for k, v in changes.items() if k.startswith(f"{name}.")}
    rest = {key: value for key, value in often.items() if key not in own}
    lines = [f"{name}:", *_indented(own)]
    comments = _indented(rest)
    if own:
        return "\n".join(lines + [f"  # {line[2:]}" for line in comments]) + "\n"
    return "\n".join(f"# {line}" for line in lines + comments) + "\n"


def _indented(values: dict[str, object]) -> list[str]:
    return [f"  {line}" for line in notation.write(values).splitlines()] if values else []
