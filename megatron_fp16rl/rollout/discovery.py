"""Where servers are: each supervisor registers its healthy server in a folder that the learner reads."""

from __future__ import annotations  # for the host of a container: launch/supervisor.py

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_fp16rl.utils.files import write_json

_ALL_FAILED = "gone"


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and its keys: `api` may generate, only `admin` may update weights.

    Each start has new keys, so a server that was restarted is another endpoint.
    """

    url: str
    api: str
    admin: str


def private_json(path: Path, value: object) -> None:
    """Writes JSON that only this user can read."""
    write_json(path, value, mode=0o600)


def register(folder: Path, index: int, endpoint: Endpoint) -> None:
    """Tells the learner where server `index` is."""
    private_json(folder / f"{index}.json", asdict(endpoint))


def deregister(folder: Path, index: int) -> None:
    """Removes what `register` wrote."""
    (folder / f"{index}.json").unlink(missing_ok=True)


def registered(folder: Path) -> list[Endpoint]:
    """The registered servers, by number."""
    endpoints = []
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        with contextlib.suppress(FileNotFoundError):  # deregistered in between
            endpoints.append(Endpoint(**json.loads(path.read_text())))
    return endpoints


def mark_all_failed(folder: Path) -> None:
    """Tells the learner that every supervisor has ended: no server will register any more."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ALL_FAILED).touch()


def all_failed(folder: Path) -> bool:
    """Whether `mark_all_failed` was called."""
    return (folder / _ALL_FAILED).exists()
