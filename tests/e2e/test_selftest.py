"""`fp16rl selftest` as people run it, and its rows of many processes."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_fp16rl.tools.selftest import layouts, ranks
from megatron_fp16rl.tools.selftest.result import Report, Setting
from megatron_fp16rl.tools.selftest.rows import ROWS
from tests.conftest import ROOT, python, run_ranks

COMMAND = ["-m", "megatron_fp16rl.cli", "selftest", "--quick"]
BY_COMMAND = ("environment", "parity", "waits")
IN_A_RANK = ("scaling", "logprobs", "products", "kernels", "shapes", "memory", "mismatch")
# layouts and sync below, collectives in test_bench.py; speed wants a GPU, its bounds are in tests/unit.
ELSEWHERE = ("layouts", "sync", "collectives", "speed")


def test_rows_pass_on_cpus(tmp_path):
    assert {*BY_COMMAND, *IN_A_RANK, *ELSEWHERE} == set(ROWS)
    out = tmp_path / "selftest.json"
    command = [*COMMAND, "--only", ",".join(BY_COMMAND), "--gpus", "0", "--json", "--out", out]
    done = python(*command, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = Report.model_validate_json(done.stdout)
    assert Report.model_validate_json(out.read_text()) == report
    status = {row.name: row.status for row in report.rows}
    assert status == {"environment": "pass", "parity": "pass", "waits": "not here"}
    assert report.passed
    assert report.quick
    assert report.machine["versions"]["torch"]


@pytest.mark.parametrize("name", IN_A_RANK)
def test_a_row_passes_in_a_process_that_has_imported_all(name):
    """mismatch: bf16 is at least five times as far from the learner as fp16."""
    assert run_ranks(1, "selftest.row", name=name) == [[]]


def test_the_learner_is_right_at_every_layout(tmp_path, monkeypatch):
    def forked(count, function, folder, arguments):
        return run_ranks(count, "selftest.call", function=function, arguments=arguments)

    monkeypatch.setattr(ranks, "run", forked)
    checks = layouts.layouts(Setting(False, tmp_path))
    assert len(checks) == 5 * 3
    assert all(check.holds for check in checks), checks


def test_weights_reach_servers_of_which_one_hangs_and_one_dies():
    """And a tensor that is left out of syncs fails the row."""
    (found,) = run_ranks(1, "selftest.syncs", timeout=300)
    assert len(found["kept"]) == 1
    # Before the servers were left, and with those that a hang left.
    left_out = ["nats between server and learner", "nats, sent to these again"]
    assert found["failed"] == {"left out": left_out, "nothing": []}
    assert "took more than 10 s" in found["said"]


def test_nothing_outlives_a_selftest_that_is_killed():
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "--only", "parity"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    children, deadline = [], time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    _, alive = psutil.wait_procs(children, 20)
    assert not alive
