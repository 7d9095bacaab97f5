"""The process that writes a checkpoint while training goes on; with ranks: tests/ranks/test_resume.py."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from megatron_fp16rl.utils.processes import PARENT_VARIABLE
from tests.conftest import ROOT


@pytest.fixture
def memory():
    """An open file in host memory."""
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


def write(folder, memory, *names, parent):
    """Returns what the writer said, and its exit code. parent: the process that it takes for its own."""
    module = "megatron_fp16rl.learner.checkpoint_writer"
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), "large", str(memory), *names],
        cwd=ROOT,
        env={**os.environ, PARENT_VARIABLE: str(parent)},
        pass_fds=(memory,),
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    return done.stdout, done.returncode


def test_writer_copies_memory_and_checksums_what_it_is_told(tmp_path, memory):
    content = os.urandom((5 << 20) + 3)
    os.write(memory, content)
    (tmp_path / "small").write_text("1")
    said, _ = write(tmp_path, memory, "small", parent=os.getpid())
    assert (tmp_path / "large").read_bytes() == content
    assert json.loads(said)["digests"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("small", b"1"), ("large", content))
    }
    said, _ = write(tmp_path, memory, parent=os.getpid())
    assert json.loads(said) == {"errno": 17, "file": str(tmp_path / "large")}, "it is there already"


def test_writer_dies_with_the_rank_that_started_it(tmp_path, memory):
    """As every child does: test_processes.py."""
    _, code = write(tmp_path, memory, parent=1)
    assert code
    assert not (tmp_path / "large").exists()
