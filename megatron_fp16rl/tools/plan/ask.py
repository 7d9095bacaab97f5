"""Planning from within another command: in a process of its own, which can do nothing else afterwards."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.source import local_folder
from megatron_fp16rl.recipe import KL, Algorithm, Optimizer, Recipe, RecipeError
from megatron_fp16rl.utils.files import write_text

_LIMIT_S = 900
# What plans do not depend on. That there is a reference policy costs a scoring, and warming up longer
# than the run is warned of.
_APART = {
    "base": True,
    "name": True,
    "description": True,
    "provenance": True,
    "algorithm": {**dict.fromkeys(Algorithm.model_fields, True), "kl": set(KL.model_fields)},
    "gates": True,
    "trainer": {"seed"},
    "learner": {"optimizer": set(Optimizer.model_fields) - {"warmup_updates"}},
}


def plan_of(recipe: Recipe) -> dict[str, object] | None:
    """What `fp16rl plan --json` says of a recipe; None if its model's shape is not known here.

    Raises RecipeError where it has nothing to plan.
    """
    model = recipe.model
    shaped = model.build is not None or (model.shape is not None and Path(model.shape).exists())
    if not shaped and local_folder(model.path) is None:
        return None
    model_config(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{recipe.name}.yaml"
        write_text(path, recipe.to_yaml())
        done = subprocess.run(
            [sys.executable, "-m", "megatron_fp16rl.cli", "plan", str(path), "--json"],
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    if done.returncode not in (0, 1) or not done.stdout.strip():
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        raise RecipeError(f"{recipe.name} could not be planned: {last[0].removeprefix('error: ')}")
    return json.loads(done.stdout)


def distinct(recipes: Iterable[Recipe]) -> list[Recipe]:
    """The first of all recipes that have one plan, as most of a sweep's have."""
    return list({r.model_dump_json(exclude=_APART): r for r in reversed(list(recipes))}.values())
