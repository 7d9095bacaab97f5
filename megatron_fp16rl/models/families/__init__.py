"""The model families: a file states all that sets a family apart; a new file is a new family.

`blocks` has what several share, models/spec.py what all do.
"""

import importlib
import pkgutil

from megatron_fp16rl.models.families.family import Family as Family

_SHARED = ("blocks", "family")


def _load() -> dict[str, Family]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.model_type: family for family in families}


FAMILIES = _load()
