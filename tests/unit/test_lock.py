"""One works on a run at a time, whoever started it: a launcher, ranks of MPI, a job's script."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from launch import batch_script, lock, outcome
from megatron_fp16rl.recipe import load
from tests.conftest import ROOT
from tests.runs import wait_for

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
HOLD = (
    "import sys, time; from pathlib import Path; from launch.lock import alone_in\n"
    "with alone_in(Path(sys.argv[1]), '4711'): print('held', flush=True); time.sleep(600)"
)


def test_who_works_on_a_run_is_told_until_it_ends(tmp_path):
    assert lock.holder(tmp_path) is None
    assert lock.holder(tmp_path / "absent") is None
    command = [sys.executable, "-c", HOLD, tmp_path]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert lock.holder(tmp_path) == lock.Owner(socket.gethostname(), holder.pid, "4711")
        with pytest.raises(
            lock.RunInUse, match=f"{tmp_path} is in use by job 4711, on .*; wait, or"
        ):
            with lock.alone_in(tmp_path):
                pass
    finally:
        holder.kill()
        holder.wait()
    wait_for(lambda: lock.holder(tmp_path) is None, 60, "the kernel frees it")
    with lock.alone_in(tmp_path):
        assert lock.holder(tmp_path) == lock.Owner(socket.gethostname(), os.getpid())
    assert lock.holder(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"node7 12x\n", b"a b c d\n"])
def test_a_lock_that_does_not_say_whose_it_is_is_one_all_the_same(content, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock.holder(tmp_path).pid == 0
    assert lock.holder(tmp_path) is None


def test_a_job_that_comes_second_is_refused_and_touches_nothing(tmp_path):
    run = tmp_path / "run"
    script = batch_script.write(load(RECIPE, ["slurm={gpus_per_node: 0, time: '10'}"]), run)
    outcome.write(run, outcome.STOPPED)
    before = sorted(run.rglob("*"))
    environment = {**os.environ, "SLURM_JOB_ID": "12", "PYTHONPATH": str(ROOT)}
    command = {"args": ["bash", script], "cwd": ROOT, "env": environment}
    with lock.alone_in(run):
        done = subprocess.run(**command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"{run} is in use by process {os.getpid()} on " in done.stderr
    assert sorted(run.rglob("*")) == sorted([*before, run / ".lock"])
    assert outcome.read(run).word == outcome.STOPPED


@pytest.mark.parametrize(
    ("owner", "squeue", "taken"),
    [
        ("", None, False),
        ("HERE THIS", None, True),
        ("HERE 4194305", None, False),  # beyond pid_max: it is gone
        ("node7 1", None, True),  # nobody here can tell
        ("node7 1 12", None, False),  # this job, requeued
        ("node7 1 11", "echo RUNNING", True),
        ("node7 1 11", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", False),
        ("node7 1 11", "echo Unable to contact slurm controller >&2; exit 1", True),
        ("node7 1 11", None, True),
    ],
)
def test_on_a_file_system_without_locks_the_name_in_the_file_counts(
    owner, squeue, taken, tmp_path, monkeypatch
):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if squeue else str(tmp_path))
    if squeue:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
        (tmp_path / "squeue").chmod(0o755)
    owner = owner.replace("HERE", socket.gethostname()).replace("THIS", str(os.getpid()))
    (tmp_path / ".lock").write_text(owner)
    if taken:
        assert lock.holder(tmp_path) is not None
        with pytest.raises(lock.RunInUse, match=r"no locks: if that has ended, remove \.lock"):
            with lock.alone_in(tmp_path, "12", patience_s=0):
                pass
        return
    with lock.alone_in(tmp_path, "12"):
        assert (tmp_path / ".lock").read_text() == f"{socket.gethostname()} {os.getpid()} 12"
    assert lock.holder(tmp_path) is None
