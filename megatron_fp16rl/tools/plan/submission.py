"""Plans for `fp16rl submit`, each in a process of its own: a process that plans can do nothing else."""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.models.source import local_folder
from megatron_fp16rl.recipe import Algorithm, Recipe, RecipeError
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import answer

_TIMEOUT_S = 900
# Keys on which no plan depends, but for a warning. A KL penalty scores the reference policy.
_IRRELEVANT: dict[str, Any] = {
    **dict.fromkeys(("base", "name", "description", "provenance", "gates", "trackers"), True),
    "algorithm": set(Algorithm.model_fields) - {"kl"},
    "trainer": {"seed"},
    "learner": {"optimizer"},
}


def plan_of(recipe: Recipe) -> dict[str, Any] | None:
    """`fp16rl plan --json` of a recipe; None if its model's shape is not known on this machine.

    Raises RecipeError where nothing can be planned.
    """
    model = recipe.model
    has_shape = model.build is not None or (model.shape is not None and Path(model.shape).exists())
    if not has_shape and (model.path is None or local_folder(model.path) is None):
        return None
    model_config(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{recipe.name}.yaml"
        write_text(path, recipe.to_yaml())
        command = [sys.executable, "-m", "megatron_fp16rl.cli", "plan", str(path), "--json"]
        done = answer(command, _TIMEOUT_S)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RecipeError(f"{recipe.name} could not be planned: {last.removeprefix('error: ')}")
    return json.loads(done.stdout)


def distinct(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Of recipes that share a plan, as most of a sweep's do, the first."""
    by_plan = {r.model_dump_json(exclude=_IRRELEVANT): r for r in reversed(list(recipes))}
    return list(by_plan.values())
