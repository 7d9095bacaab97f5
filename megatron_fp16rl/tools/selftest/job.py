"""The selftest on several nodes: a task on each, whose reports become one."""

import time
from pathlib import Path

from launch import bootstrap, outcome
from megatron_fp16rl.tools.selftest import ranks
from megatron_fp16rl.tools.selftest.result import Report
from megatron_fp16rl.utils.files import write_text

_PATIENCE_S = 3600.0  # for the slowest node


def join(folder: Path) -> bool:
    """Makes this task of a job's step one of the selftest's machines; whether it is the first. See ranks.nodes."""
    bootstrap.from_slurm(folder)
    return ranks.nodes()[1] == 0


def merge(folder: Path, report: Report) -> Report | None:
    """The report of all machines, on the first of them; None on the others.

    The outcome goes to where `fp16rl status` finds it. Raises RuntimeError if a machine does not answer.
    """
    machines, own = ranks.nodes()
    files = [folder / f"machine_{machine}.json" for machine in range(machines)]
    write_text(files[own], report.model_dump_json())
    if own:
        return None
    deadline = time.monotonic() + _PATIENCE_S
    while missing := [file.name for file in files if not file.exists()]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {_PATIENCE_S:g} s there is no {', '.join(missing)}")
        time.sleep(0.5)
    whole = joined([Report.model_validate_json(file.read_text()) for file in files])
    word = outcome.DONE if whole.passed else outcome.FAILED
    outcome.write(folder, word, whole.summary)
    return whole


def joined(reports: list[Report]) -> Report:
    """One report of several machines'."""
    hosts = [host for report in reports for host in report.machine["hosts"]]
    return Report(
        passed=all(report.passed for report in reports),
        quick=reports[0].quick,
        machine={**reports[0].machine, "hosts": hosts},
        rows=[row for report in reports for row in report.rows],
    )
