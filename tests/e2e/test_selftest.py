"""`fp16rl selftest` as people run it."""

import signal
import subprocess
import sys
import time

import psutil

from megatron_fp16rl.tools.selftest.result import Report
from megatron_fp16rl.tools.selftest.rows import ROWS
from tests.conftest import ROOT, python, run_ranks

COMMAND = ["-m", "megatron_fp16rl.cli", "selftest", "--quick"]


def test_quick_rows_pass_on_cpus(tmp_path):
    out = tmp_path / "selftest.json"
    done = python(*COMMAND, "--gpus", "0", "--json", "--out", out, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = Report.model_validate_json(done.stdout)
    assert Report.model_validate_json(out.read_text()) == report
    status = {row.name: row.status for row in report.rows}
    chosen = [name for name, row in ROWS.items() if row.in_quick]
    of_gpus = dict.fromkeys(("waits", "speed"), "not here")
    assert status == {**dict.fromkeys(chosen, "pass"), **of_gpus}
    assert report.passed
    assert report.quick
    assert report.machine["versions"]["torch"]


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


def test_a_tensor_left_out_of_a_sync_and_a_silent_server_fail_their_row():
    (found,) = run_ranks(1, "selftest.faulty_syncs", timeout=300)
    assert len(found["kept"]) == 1
    # Before the servers were left, and with those that a hang left.
    assert found["left out"] == ["nats between server and learner", "nats, sent to these again"]
    assert "took more than 10 s" in found["said"]
    assert found["url"] in found["said"]


def test_the_other_rows_pass():
    """Hung and killed servers among them; bf16 at least five times as far from the learner as fp16."""
    others = [name for name, row in ROWS.items() if not row.in_quick]
    assert others == ["layouts", "shapes", "sync", "mismatch"]
    done = python(*COMMAND, "--only", ",".join(others), "--json", check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = Report.model_validate_json(done.stdout)
    assert [(row.name, row.status) for row in report.rows] == [(name, "pass") for name in others]
