"""Functions of this package in processes of their own.

`python -m megatron_fp16rl.tools.selftest.process MODULE.FUNCTION ANSWER ARGUMENTS` writes what a function returns.
"""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import die_with_parent, spawn, stop, tail

_GRACE_S = 10  # for the others, once one has failed
_PACKAGE = "megatron_fp16rl.tools.selftest"


class Ended(RuntimeError):
    """A process came to no answer. reason: in a line; log: the end of what it printed."""

    def __init__(self, reason: str, log: str) -> None:
        super().__init__(f"{reason}. The log ends so:\n{log}")
        self.reason, self.log = reason, log


def call(
    function: str,
    folder: Path,
    arguments: Mapping[str, Any],
    timeout_s: float,
    environments: Sequence[dict[str, str]] = ({},),
) -> list[Any]:
    """Calls "module.function" in a process for each environment; what each returned, which is JSON.

    folder: new, for their files. Raises Ended, about the first to fail or to be late.
    """
    folder.mkdir()
    command = [sys.executable, "-m", f"{_PACKAGE}.process", function]
    numbers, failed = range(len(environments)), list[int]()
    children = []
    deadline = time.monotonic() + timeout_s
    try:
        for number, environment in enumerate(environments):
            words = [*command, str(folder / f"{number}.json"), json.dumps(arguments)]
            children.append(spawn(words, folder / f"{number}.log", environment))
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            if not failed and (failed := [i for i in numbers if children[i].poll()]):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(0.05)
        codes = [child.poll() for child in children]
    finally:  # also when we are interrupted
        stop(children, patience_s=0)
    for number in failed or [i for i in numbers if codes[i] != 0]:
        code, log = codes[number], folder / f"{number}.log"
        if code is None:
            reason = f"it took more than {timeout_s:g} s"
        elif code < 0:
            reason = f"{signal.Signals(-code).name} ended its process"
        else:
            reason = tail(log, 1) or f"exit code {code}"
        raise Ended(reason, tail(log))
    return [json.loads((folder / f"{number}.json").read_text()) for number in numbers]


def main() -> None:
    """An error ends the process without an answer."""
    die_with_parent()
    module, function = sys.argv[1].split(".")
    result = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)(
        **json.loads(sys.argv[3])
    )
    write_text(Path(sys.argv[2]), json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # an orderly exit would wait for groups of ranks that have gone


if __name__ == "__main__":
    main()
