"""Runs rows one after the other, each in a process of its own, and judges them."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_fp16rl.tools.bench.common import facts
from megatron_fp16rl.tools.selftest.result import Answer, Report, RowResult
from megatron_fp16rl.tools.selftest.rows import ROWS, Row
from megatron_fp16rl.utils.processes import spawn, stop, tail

# fp32 is fp32: Transformer Engine asks cuBLAS for TF32, whose 10 bits are those of fp16.
_ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0"}


def run(
    names: Sequence[str],
    quick: bool,
    say: Callable[[str], None],
    rows: Mapping[str, Row] = ROWS,
) -> Report:
    """Runs the rows of these names. They are independent: one that fails holds up no other."""
    results = []
    # A short name: sockets of servers are in it.
    with tempfile.TemporaryDirectory(prefix="fp16rl-", ignore_cleanup_errors=True) as folder:
        for name in names:
            say(f"{name}: {rows[name].what}")
            result = _run_row(name, rows[name], quick, Path(folder))
            say(f"{name}: {result.status} after {result.seconds:.0f} s")
            results.append(result)
    passed = all(result.status != "fail" for result in results)
    return Report(passed=passed, quick=quick, machine=facts(), rows=results)


def _run_row(name: str, row: Row, quick: bool, folder: Path) -> RowResult:
    answer, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, "-m", "megatron_fp16rl.tools.selftest.process"]
    command += [name, str(folder / name), str(answer), *(["--quick"] if quick else [])]
    began = time.monotonic()
    # Processes that are killed leave their temporary files: these go with the folder.
    child = spawn(command, log, {**_ENVIRONMENT, "TMPDIR": str(folder)})
    try:
        code: int | None = child.wait(row.timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:  # also when we are interrupted
        stop([child], patience_s=0)
    seconds = round(time.monotonic() - began, 1)
    if code == 0:
        return judge(name, row, Answer.model_validate_json(answer.read_text()), seconds)
    return judge(name, row, _trouble(code, row.timeout_s, log), seconds, tail(log))


def _trouble(code: int | None, timeout_s: float, log: Path) -> str:
    """Why a row's process came to no answer."""
    if code is None:
        return f"it took more than {timeout_s:g} s"
    if code < 0:
        return f"{signal.Signals(-code).name} ended its process"
    return tail(log, 1) or f"exit code {code}"


def judge(
    name: str, row: Row, answer: Answer | str, seconds: float, log: str | None = None
) -> RowResult:
    """The verdict on a row. answer: or why there is none, which is a failure; no checks are one, too."""
    trouble = answer if isinstance(answer, str) else None
    checks, not_here = ([], None) if isinstance(answer, str) else (answer.checks, answer.not_here)
    if trouble is None and not_here is None and not checks:
        trouble = "it checked nothing"
    failed = [check.name for check in checks if not check.holds]
    return RowResult(
        name=name,
        host=socket.gethostname(),
        what=row.what,
        status="fail" if trouble or failed else "not here" if not_here else "pass",
        measured={check.name: check.value for check in checks},
        bound={check.name: check.bound for check in checks},
        failed=failed,
        source=row.source,
        reason=trouble or not_here,
        log=log,
        seconds=seconds,
    )
