"""One works on a run at a time, whoever started it: a launcher, ranks of MPI or srun, a job's script."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import batch_script, lock, outcome
from megatron_fp16rl.recipe import load
from tests.conftest import ROOT

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"

HOLD = (
    "import sys, time; from pathlib import Path; from launch.lock import alone_in\n"
    "with alone_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


def started(*command, **environment):
    """A process of ours that has said a line."""
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def wait_until_free(folder):
    deadline = time.monotonic() + 60
    while lock.holder(folder) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_who_works_on_a_run_is_told_until_it_ends(tmp_path):
    assert lock.holder(tmp_path) is None
    assert lock.holder(tmp_path / "absent") is None
    holder = started(sys.executable, "-c", HOLD, tmp_path)
    try:
        assert lock.holder(tmp_path) == lock.Owner(socket.gethostname(), holder.pid)
        said = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}; wait, or"
        with pytest.raises(lock.RunInUse, match=said), lock.alone_in(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    wait_until_free(tmp_path)
    with lock.alone_in(tmp_path):
        assert lock.holder(tmp_path).pid == os.getpid()
    assert lock.holder(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"node7\n", b"node7 12x\n", b"a b c d\n"])
def test_a_lock_that_does_not_say_whose_it_is_is_one_all_the_same(content, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock.holder(tmp_path).pid == 0
    assert lock.holder(tmp_path) is None


def test_a_lock_says_whose_it_is_before_it_is_cut_to_length(tmp_path, monkeypatch):
    """Whoever looks between the two steps finds an owner."""
    (tmp_path / ".lock").write_text("a-host-with-a-longer-name-than-this-one 4194305 4711\n" * 9)
    cut, found = os.ftruncate, []

    def look(descriptor, length):
        found.append(lock._named(descriptor))
        cut(descriptor, length)

    monkeypatch.setattr(os, "ftruncate", look)
    with lock.alone_in(tmp_path):
        assert found == [lock.Owner(socket.gethostname(), os.getpid())]


def test_a_job_holds_the_lock_by_its_supervisor_and_is_named(tmp_path):
    code = HOLD.replace("import alone_in", "import alone_in, this_job").replace(
        "])", "]), this_job()"
    )
    job = started(sys.executable, "-c", code, tmp_path, SLURM_JOB_ID="4711")
    owner = lock.Owner(socket.gethostname(), job.pid, "4711")
    try:
        assert lock.holder(tmp_path) == owner
        with pytest.raises(lock.RunInUse, match=r"in use by job 4711, on "):
            with lock.alone_in(tmp_path):
                pass
        with lock.alone_in(tmp_path, "4711"):  # a rank of the job, whose environment was not kept
            pass
        assert lock.holder(tmp_path) == owner
    finally:
        job.kill()
        job.wait()
    wait_until_free(tmp_path)


def test_who_comes_second_is_refused_and_touches_nothing(tmp_path):
    """A job's script that finds the run taken, and a rank that was started by hand."""
    run = tmp_path / "run"
    script = batch_script.write(load(RECIPE, ["slurm={gpus_per_node: 0, time: '10'}"]), run)
    outcome.write(run, outcome.STOPPED)
    before = sorted(run.rglob("*"))
    slurms = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node1", "SLURM_PROCID": "0"}
    with lock.alone_in(run):
        for command in (["bash", script], [sys.executable, "-m", "launch.rank", run]):
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **slurms, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 1
            assert f"{run} is in use by process {os.getpid()} on " in done.stderr
    assert sorted(run.rglob("*")) == sorted([*before, run / ".lock"])
    assert outcome.read(run).word == outcome.STOPPED


def none(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize(
    ("owner", "squeue", "taken"),
    [
        ("", None, False),
        ("HERE THIS", None, True),
        ("HERE 4194305", None, False),  # beyond pid_max: it is gone
        ("node7 1", None, True),  # who knows
        ("node7 1 12", None, False),  # this job, requeued
        ("node7 1 11", "echo RUNNING", True),
        ("node7 1 11", "true", False),
        ("node7 1 11", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", False),
        ("node7 1 11", "echo Unable to contact slurm controller >&2; exit 1", True),
        ("node7 1 11", None, True),
    ],
)
def test_on_a_file_system_without_locks_what_is_written_counts(
    owner, squeue, taken, tmp_path, monkeypatch
):
    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if squeue else str(tmp_path))
    if squeue:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
        (tmp_path / "squeue").chmod(0o755)
    owner = owner.replace("HERE", socket.gethostname()).replace("THIS", str(os.getpid()))
    (tmp_path / ".lock").write_text(f"{owner}\n")
    assert (lock.holder(tmp_path) is not None) == taken
    if taken:
        with pytest.raises(lock.RunInUse, match=rf"has no locks .* rm {tmp_path}/.lock"):
            with lock.alone_in(tmp_path):
                pass
        return
    with lock.alone_in(tmp_path, "12"):
        assert Path(tmp_path, ".lock").read_text() == f"{socket.gethostname()} {os.getpid()} 12\n"
    assert lock.holder(tmp_path) is None
