"""Monkey-patches for pinned packages: named, tied to one version, each with a test that fails without it."""

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One patch.

    name     its name in tests and logs
    fixes    what happens without it
    apply    makes the change; called once a process
    """

    name: str
    fixes: str
    apply: Callable[[], None]


class Patches(list[Patch]):
    """Patches of one package, in the order in which they are applied."""

    def add(self, name: str, fixes: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """A decorator of what `Patch.apply` is to be; see Patch."""

        def register(apply: Callable[[], None]) -> Callable[[], None]:
            self.append(Patch(name, fixes, apply))
            return apply

        return register


def apply_all(package: str, version: str, patches: Iterable[Patch]) -> None:
    """Applies `patches`, written against exactly `package` == `version`.

    Raises RuntimeError if another version is installed: a patch of other code than it was written for
    would be a silent error.
    """
    installed = importlib.metadata.version(package)
    if installed != version:
        raise RuntimeError(
            f"{package} {installed} is installed, but running it without CUDA needs patches written "
            f"for {package} {version}. Remedy: pip install --no-deps {package}=={version}"
        )
    for patch in patches:
        patch.apply()
