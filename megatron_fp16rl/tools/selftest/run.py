"""Runs rows one after the other, each in a process of its own, and judges them."""

import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_fp16rl.tools.bench.common import facts
from megatron_fp16rl.tools.selftest import process
from megatron_fp16rl.tools.selftest.result import Answer, Report, RowResult
from megatron_fp16rl.tools.selftest.rows import ROWS, Row

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
    began = time.monotonic()
    answer: Answer | str
    # Processes that are killed leave their temporary files: these go with the folder.
    environment = {**_ENVIRONMENT, "TMPDIR": str(folder)}
    arguments = {"name": name, "folder": str(folder / name / "row"), "quick": quick}
    try:
        (given,) = process.call(
            "rows.answer", folder / name, arguments, row.timeout_s, [environment]
        )
        answer, log = Answer.model_validate(given), None
    except process.Ended as ended:
        answer, log = ended.reason, ended.log
    return judge(name, row, answer, round(time.monotonic() - began, 1), log)


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
