"""The model families: a file states all that sets a family apart; a new file is a new family.

`blocks` and `latent` have what several share, models/spec.py what all do.
"""

import importlib
import pkgutil

from megatron_fp16rl.models.families.family import Family as Family

_SHARED = ("blocks", "family", "latent")


def _load() -> dict[str, Family]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.model_type: family for family in families}


FAMILIES = _load()
# Model types that would be taken for one of these, and why they are none.
_QWEN3_5 = "Qwen3.5's tensors are inside a vision model's, which is neither built nor exported here"
REFUSED = dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _QWEN3_5)
ALIASES = {alias: family for family in FAMILIES.values() for alias in family.aliases}


def family_named(model_type: object, architectures: object) -> Family | None:
    """The family of a config.json's two keys, or None. An alias must come with the family's own class."""
    if not isinstance(model_type, str):
        return None
    family = ALIASES.get(model_type)
    if family is not None and architectures == [family.sglang[1]]:
        return family
    return FAMILIES.get(model_type)
