"""The process that writes a checkpoint while training goes on."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.utils.processes import PARENT_VARIABLE
from tests.conftest import ROOT

MIB = 1 << 20


@pytest.fixture
def memory():
    """An open file in host memory."""
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint, and the folder of a second one."""
    folder = tmp_path / "checkpoints"
    first = checkpoint_files.begin(folder, 1)
    (first / "some").write_text("file")
    checkpoint_files.commit(first, 1, {"some": checkpoint_files.digest(first / "some")})
    return checkpoint_files.begin(folder, 2)


def command(folder, memory, *names):
    module = "megatron_fp16rl.learner.checkpoint_writer"
    return [sys.executable, "-m", module, str(folder), "large", str(memory), *names]


def start(folder, memory, *names):
    return subprocess.Popen(
        command(folder, memory, *names), cwd=ROOT, pass_fds=(memory,), stdout=subprocess.PIPE
    )


def test_writer_copies_memory_and_checksums_what_it_is_told(run, memory):
    content = os.urandom(5 * MIB + 3)
    os.write(memory, content)
    (run / "small").write_text("1")
    said, _ = start(run, memory, "small").communicate(timeout=60)
    assert (run / "large").read_bytes() == content
    assert json.loads(said)["digests"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("small", b"1"), ("large", content))
    }


def test_writer_killed_half_way_leaves_the_checkpoint_before(run, memory):
    os.ftruncate(memory, 512 * MIB)
    writer, file = start(run, memory), run / "large"
    while not file.exists() or file.stat().st_size < 8 * MIB:
        assert writer.poll() is None
        time.sleep(0.001)
    writer.kill()
    assert writer.wait(60) == -signal.SIGKILL
    assert file.stat().st_size < 512 * MIB
    (newest,) = checkpoint_files.available(run.parent)
    assert newest.step == 1
    assert newest.faults(newest.files()) == []
    assert not checkpoint_files.begin(run.parent, 2).samefile(newest.path)
    assert not run.exists(), "the next one removes what was left"


def test_writer_says_what_the_disk_refused(run, memory):
    os.write(memory, b"1")
    (run / "large").mkdir()
    said, _ = start(run, memory).communicate(timeout=60)
    assert json.loads(said) == {"errno": 17, "file": str(run / "large")}


def test_writer_dies_with_the_rank_that_started_it(run, memory):
    """Killed in the middle of a file; the launcher's end is the rank's, which dies with it likewise."""
    os.ftruncate(memory, 2048 * MIB)
    code = f"""
import os, subprocess, time
environment = {{**os.environ, {PARENT_VARIABLE!r}: str(os.getpid())}}
writer = subprocess.Popen({command(run, memory)!r}, pass_fds=({memory},), env=environment)
print(writer.pid, flush=True)
time.sleep(60)
"""
    rank = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        pass_fds=(memory,),
        stdout=subprocess.PIPE,
        text=True,
    )
    writer = int(rank.stdout.readline())
    deadline = time.monotonic() + 60
    while not (run / "large").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    rank.kill()
    rank.wait(60)
    while is_running(writer):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (run / "large").stat().st_size < 2048 * MIB


def is_running(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
