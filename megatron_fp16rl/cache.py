"""Things that are costly to make and depend on nothing but what made them."""

import hashlib
import json
import os
from pathlib import Path


def cache_folder(kind: str, *ingredients: object) -> Path:
    """Where the thing made of `ingredients` (JSON values) is kept; it may not exist yet.

    The root is $FP16RL_CACHE, by default ~/.cache/fp16rl.
    """
    root = Path(os.environ.get("FP16RL_CACHE", Path.home() / ".cache" / "fp16rl"))
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    return root / kind / digest[:16]


def sources(*packages: str) -> str:
    """A digest of our own code, for what depends on it: all modules of some sub-packages."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted((here / package).glob("**/*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
