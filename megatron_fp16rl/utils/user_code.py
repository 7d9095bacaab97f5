"""Functions of the user's own, named by a recipe as FILE.py:FUNCTION."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def file_of(name: str) -> Path:
    return Path(name.rpartition(":")[0])


def load_function(name: str, *takes: str) -> Callable[..., Any]:
    """Imports the file, with its folder on the path as for a script; a function is to take so many arguments.

    Raises ValueError, ImportError, and whatever the file raises.
    """
    path, function_name = file_of(name), name.rpartition(":")[2]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:  # of a script's last lines: ours would end without a word
        raise ValueError(
            f"{path} ends the program when it is imported: SystemExit: {error}"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(
            f"{path} has no function {function_name!r}; it has: {', '.join(known) or 'none'}"
        )
    if takes:
        check_takes(function, *takes)
    return function


def check_takes(function: Callable[..., Any], *names: str) -> None:
    """Raises ValueError unless a function can be called with so many arguments, as far as it says."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some that are written in C do not say
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        name = getattr(function, "__name__", function)
        raise ValueError(f"{name} is called with ({', '.join(names)}): {error}") from None
