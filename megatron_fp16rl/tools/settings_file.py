"""A folder of results belongs to one set of settings: results of others are never mixed into it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.utils.files import read_json, write_json


def check_settings(file: Path, settings: dict[str, Any], what: str, option: str) -> None:
    """Writes the settings into a folder's `file`. Raises RecipeError if it holds others.

    what: is in the folder, option: names another folder; both for the message.
    """
    settings = json.loads(json.dumps(settings))  # as they are read back
    if file.exists():
        kept = read_json(file)
        for key, value in settings.items():
            if kept.get(key) != value:
                raise RecipeError(
                    f"{file.parent} holds {what} with {key} = {kept.get(key)}, not {value}; give "
                    f"another {option}, or remove that folder"
                )
    write_json(file, settings)


def digest(value: object) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """A hash of the names, sizes and times of a model's files; contents are not read."""
    files = sorted(folder.glob("*.safetensors"))
    return digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])
