"""Sweeps: one recipe with several values of some keys, a run for each, as one Slurm job array."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import batch_script, sbatch, slurm
from launch.run_folder import new_run_folder
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.utils.files import write_text

RUNS = "runs"  # in a sweep's directory: its runs, one path a line, in the order of the array
_SPLIT = re.compile(r",(?![^\[{]*[\]}])")  # commas outside brackets


@dataclass(frozen=True)
class Axis:
    """A key and its values."""

    key: str
    values: list[str]

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """Of KEY=VALUE,VALUE,... Raises RecipeError."""
        key, equals, values = text.partition("=")
        if not key or not equals or not all(parts := [v.strip() for v in _SPLIT.split(values)]):
            raise RecipeError(f"--sweep {text}: write KEY=VALUE,VALUE,...")
        if key.split(".")[0] in ("slurm", "name"):
            raise RecipeError(f"--sweep {text}: the jobs of an array ask Slurm for the same")
        if len(set(parts)) < len(parts):
            raise RecipeError(f"--sweep {text}: a value is there twice")
        return cls(key, parts)


def points(axes: Sequence[Axis]) -> list[tuple[str, list[str]]]:
    """Every combination: a name that holds the values, and the overrides. Raises RecipeError."""
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise RecipeError("--sweep: a key is there twice; give all its values at once")
    ends = [key.rpartition(".")[2] for key in keys]
    labels = ends if len(set(ends)) == len(ends) else keys
    combinations = []
    for values in itertools.product(*(axis.values for axis in axes)):
        name = "-".join(f"{label}-{v}" for label, v in zip(labels, values, strict=True))
        settings = [f"{key}={v}" for key, v in zip(keys, values, strict=True)]
        combinations.append((re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_"), settings))
    if len({name for name, _ in combinations}) == len(combinations):
        return combinations
    # a/b and a_b make one name
    return [(f"{name}-{i}", settings) for i, (name, settings) in enumerate(combinations, 1)]


def write(recipes: dict[str, Recipe], root: Path, name: str, max_running: int | None) -> Path:
    """Writes a directory for a sweep, one in it for each run, and the array's script; returns it.

    recipes: resolved, by the names of their runs. max_running: runs at a time; None: all.
    """
    first = next(iter(recipes.values()))
    if first.slurm is not None and first.slurm.rollout_partition is not None:
        raise RecipeError(
            "Slurm has no arrays of heterogeneous jobs: a sweep cannot have slurm.rollout_partition"
        )
    folder = new_run_folder(root, name).resolve()
    runs = []
    for label, recipe in recipes.items():
        run = new_run_folder(folder, label)
        batch_script.write(recipe, run)
        runs.append(run)
    write_text(folder / RUNS, "".join(f"{run}\n" for run in runs))
    (folder / "logs").mkdir()
    limit = f"%{max_running}" if max_running else ""
    options = {
        "array": f"0-{len(runs) - 1}{limit}",
        "output": sbatch.log_pattern(folder, "array-%a.out"),
    }
    array = first.model_copy(update={"name": name})
    script = batch_script.render(array, folder, template="array.sbatch.j2", options=options)
    write_text(folder / batch_script.SCRIPT, script)
    return folder


def submit(folder: Path) -> str:
    """Puts a sweep into the queue; returns the array's number. Raises SlurmError."""
    job = slurm.submit(folder / batch_script.SCRIPT)
    for index, run in enumerate(runs(folder)):
        slurm.record(run, slurm.task(job, index))
    return job


def runs(folder: Path) -> list[Path]:
    """The runs of a sweep's directory, wherever it was moved to since; none if it is not one."""
    file = folder / RUNS
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    return [folder / name for line in lines if (name := Path(line).name)]
