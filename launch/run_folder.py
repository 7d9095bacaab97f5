"""Run directories: a new one for each run, what cannot be written to, and paths that hold from everywhere."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.recipe import Recipe, Suite
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import is_full, is_refused

_PATHS = (
    ("model", "shape"),
    ("task", "path"),
    ("task", "problems"),
    ("task", "reward", "path"),
    ("rollout", "replay"),
    ("rollout", "function"),  # FILE.py:FUNCTION, as a reward's and an environment's
)


class Unwritable(ExplainedError):
    """A run directory cannot be written to. The message names the remedy."""


def new_run_folder(root: Path, name: str) -> Path:
    """Makes root/name, or root/name-2, ... : an earlier run is never overwritten.

    Only this user can read it: it holds keys, prompts and responses. Raises Unwritable.
    """
    with writable(root):
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise Unwritable(
                f"trainer.run_root={root} is a file, or in one: name a folder"
            ) from None
        for number in range(1, 10_000):
            folder = root / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                return folder
    raise RuntimeError(f"{root} holds too many runs called {name}")


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Raises Unwritable if the block cannot write into a folder."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise Unwritable(f"no space left: {checkpoint_files.space_report(folder)}") from None
        if is_refused(error):
            raise Unwritable(
                f"{folder} cannot be written to: {error.strerror}. Mount it read-write, mind its "
                "permissions, or run elsewhere (trainer.run_root)"
            ) from None
        raise


def absolute(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths: a job or a resumed run starts in another directory.

    A model or data set that no folder is called like is a name in the hub's cache, and stays one.
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
    if ".py:" in values["algorithm"]["loss"]:  # FILE.py:FUNCTION
        values["algorithm"]["loss"] = _absolute(values["algorithm"]["loss"])
    for suite in values["trainer"]["suites"]:
        if Suite(**suite).is_file:
            suite["suite"] = _absolute(suite["suite"])  # FILE:METRIC
    return Recipe.model_validate(values)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
