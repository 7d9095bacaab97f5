"""Sweeps: one recipe with several values of some keys; a run, and a job, for each combination."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from launch.run_folder import new_run_folder
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.utils.files import write_text

AXES = "sweep"  # in the directory that holds the runs of a sweep: its axes, one a line
_SPLIT = re.compile(r",(?![^\[{]*[\]}])")  # commas outside brackets


def points(axes: Sequence[str]) -> dict[str, list[str]]:
    """Every combination of axes KEY=VALUE,VALUE,...: the overrides, by a name that holds the values.

    Raises RecipeError.
    """
    keys, settings = [], []
    for text in axes:
        key, _, values = text.partition("=")
        parts = [value.strip() for value in _SPLIT.split(values)]
        if not key or not all(parts):
            raise RecipeError(f"--sweep {text}: write KEY=VALUE,VALUE,...")
        if key == "name" or key in keys or len(set(parts)) < len(parts):
            raise RecipeError(
                f"--sweep {text}: each key and value once, and a run's name is made of them"
            )
        keys.append(key)
        settings.append(
            [(f"{key.rpartition('.')[2]}-{value}", f"{key}={value}") for value in parts]
        )
    named: dict[str, list[str]] = {}
    for combination in itertools.product(*settings):
        label = "-".join(label for label, _ in combination)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", label).strip("_")
        if name in named:  # a/b and a_b make one name
            raise RecipeError(
                f"--sweep: two runs would be called {name}; sweep their values one by one"
            )
        named[name] = [setting for _, setting in combination]
    return named


def new_folder(root: Path, name: str, axes: Sequence[str]) -> Path:
    """Makes the directory that is to hold the runs of a sweep."""
    folder = new_run_folder(root, name).resolve()
    write_text(folder / AXES, "".join(f"{axis}\n" for axis in axes))
    return folder
