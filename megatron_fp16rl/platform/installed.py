"""Which packages are installed, without importing those that need a GPU."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of Python, of the packages that decide what a run computes, and of this one."""
    names = ("torch", "megatron-core", "sglang", "transformers", "megatron-fp16rl")
    found = {name: number for name in names if (number := version(name))}
    return {"python": sys.version.split()[0], **found}


def transformer_engine() -> bool:
    """Whether Transformer Engine is installed with its extension for torch.

    A folder that an uninstallation has left behind can be imported, and has nothing in it. The extension
    is where transformer-engine 2.18 looks for it (common/__init__.py, _find_shared_object_in_te_dir).
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    places = (package.parent, package, package / "wheel_lib")
    return any(list(place.glob("transformer_engine_torch*.so")) for place in places)


def apex() -> bool:
    """Whether NVIDIA's apex is installed: PyPI's package of that name has no amp_C."""
    return all(importlib.util.find_spec(name) for name in ("apex", "amp_C"))


def kernels() -> str:
    """Where layers and optimizer come from: what Megatron-core itself prefers of what is installed.

    megatron-core 0.19.2, optimizer/__init__.py: Transformer Engine's FusedAdam, else apex's, else
    torch's AdamW.
    """
    if transformer_engine():
        return "transformer_engine"
    return "apex" if apex() else "torch"
