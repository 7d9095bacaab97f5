"""Paths of a recipe as its run directory keeps them: a job or a resumed run may look from elsewhere."""

from pathlib import Path

from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.rollout.evaluation import suites

_PATHS = (
    ("model", "shape"),
    ("task", "path"),
    ("task", "problems"),
    ("task", "reward", "path"),
    ("rollout", "replay"),
)


def absolute(recipe: Recipe) -> Recipe:
    """The same recipe, whose paths lead from everywhere to where they lead from the working directory.

    A name in the hub's cache stays one unless a folder is called so, which is what would be taken.
    Options that are passed on to the engines are left alone.
    """
    values = recipe.model_dump()
    for *sections, name in _PATHS:
        section = values
        for key in sections:
            section = section.get(key) or {}
        if section.get(name) is not None:
            section[name] = _absolute(section[name])
    model, task = values["model"], values["task"]
    if model["path"] is not None and (Path(_absolute(model["path"])) / "config.json").exists():
        model["path"] = _absolute(model["path"])
    if task["kind"] == "dataset" and task["name"] is not None and Path(task["name"]).is_dir():
        task["name"] = _absolute(task["name"])
    for asked in values["trainer"]["suites"]:
        if suites.parse(asked["suite"]).source not in (suites.HELD_OUT, suites.TRAINING):
            asked["suite"] = _absolute(asked["suite"])  # FILE:METRIC
    return Recipe.model_validate(values)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
