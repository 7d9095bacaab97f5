"""The model families: each file here states all that is known of one. A new file is a new family."""

import importlib
import pkgutil

from megatron_fp16rl.models.families.family import Family as Family

_SHARED = ("blocks", "family")


def _load() -> dict[str, Family]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.model_type: family for family in families}


FAMILIES = _load()
