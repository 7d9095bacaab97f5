"""Functions of the user's own, named by a recipe as FILE.py:FUNCTION."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def file_of(name: str) -> Path:
    return Path(name.rpartition(":")[0])


def load_function(name: str) -> Callable[..., Any]:
    """Imports the file, with its folder on the path as for a script. Raises ValueError, ImportError,
    and whatever the file raises.
    """
    path, function_name = file_of(name), name.rpartition(":")[2]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(
            f"{path} has no function {function_name!r}; it has: {', '.join(known) or 'none'}"
        )
    return function
