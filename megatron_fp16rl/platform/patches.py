"""Repairs of installed packages: named, tied to one version, each with a test that fails without it."""

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One repair.

    name     how tests and logs call it
    cures    what happens without it
    apply    makes the change; called once a process
    """

    name: str
    cures: str
    apply: Callable[[], None]


def apply_all(package: str, version: str, patches: Iterable[Patch]) -> None:
    """Applies `patches`, written against exactly `package` == `version`.

    Raises RuntimeError if another version is installed: a patch that hits other code than the code
    it was written for would be a silent error.
    """
    found = importlib.metadata.version(package)
    if found != version:
        raise RuntimeError(
            f"{package} {found} is installed, but running it without CUDA needs patches written "
            f"for {package} {version}. Remedy: pip install --no-deps {package}=={version}"
        )
    for patch in patches:
        patch.apply()
