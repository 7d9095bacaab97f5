"""What a job's container must see and be told, beside the run directory and the project."""

import os
from collections.abc import Iterator
from pathlib import Path

from launch.paths import absolute
from megatron_fp16rl.recipe import Recipe, Slurm
from megatron_fp16rl.utils import cache

PROJECT = Path(__file__).parent.parent


def completed(recipe: Recipe) -> Slurm | None:
    """The recipe's `slurm:`; where there is a container, with all that it needs in `mounts` and `environment`.

    The files and folders that the recipe names, the hub's cache, and that of compiled kernels are mounted
    where they lie outside. A container has a home of its own, which is gone at its end: so it is told where
    the caches are. What the recipe says itself is kept.
    """
    slurm = recipe.slurm
    if slurm is None or slurm.container is None:
        return slurm
    caches = _caches(slurm.environment)
    Path(caches["FP16RL_CACHE"]).mkdir(parents=True, exist_ok=True)
    given = [(*mount.split(":"), "")[:2] for mount in slurm.container.mounts]
    mounted = [PROJECT, *(Path(source) for source, target in given if target in (source, ""))]
    mounts = list(slurm.container.mounts)
    for place in sorted({*_files(recipe), *map(Path, caches.values())}):
        if place.exists() and not any(place.is_relative_to(other) for other in mounted):
            mounted.append(place)
            mounts.append(f"{place}:{place}")
    container = slurm.container.model_copy(update={"mounts": mounts})
    return slurm.model_copy(
        update={"container": container, "environment": {**caches, **slurm.environment}}
    )


def _caches(given: dict[str, str]) -> dict[str, str]:
    """Where caches are, by the variables that say so: the recipe's, this shell's, or the usual place."""
    usual = {"HF_HOME": Path.home() / ".cache" / "huggingface", "FP16RL_CACHE": cache.root()}
    found = {name: os.environ.get(name, str(place)) for name, place in usual.items()}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):  # which need not be below HF_HOME
        if name in os.environ:
            found[name] = os.environ[name]
    found.update({name: value for name, value in given.items() if name in found})
    return {name: str(Path(value).expanduser().absolute()) for name, value in found.items()}


def _files(recipe: Recipe) -> Iterator[Path]:
    """The folders of what the recipe names by an absolute path, as run directories keep it."""
    values = absolute(recipe).model_dump()
    suites = [asked["suite"].rpartition(":")[0] for asked in values["trainer"]["suites"]]
    for text in [*_texts([values["model"], values["task"], values["rollout"]]), *suites]:
        if text.startswith("/") and "\n" not in text:
            path = Path(text)
            # A file's folder: a reward may import its neighbours. Nobody mounts a root or a home for one.
            alone = path.parent in (Path("/"), Path.home())
            yield path if path.is_dir() or alone else path.parent


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
