"""Whoever reads what is printed may go away: work goes on, and commands that only answer end quietly."""

import contextlib
import io
import os
import sys

import pytest

from launch.local import _show
from megatron_fp16rl.utils import output
from megatron_fp16rl.utils.processes import answer
from tests.conftest import ROOT
from tests.runs import run_folder

LINES = [b"line %d of the learner, long enough to fill a pipe soon\n" % n for n in range(4000)]


def a_pipe(reader):
    """Standard output whose reader has gone away, does not read, or is a full disk; and what to close."""
    if reader == "full disk":
        return open("/dev/full", "w"), None
    read, write = os.pipe()
    if reader == "gone":
        os.close(read)
        read = None
    return os.fdopen(write, "w"), read


@pytest.mark.parametrize("reader", ["gone", "does not read", "full disk"])
def test_the_log_is_written_whatever_becomes_of_the_terminal(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_DRAIN_TIMEOUT_S", 0.1)
    stdout, read = a_pipe(reader)
    monkeypatch.setattr(sys, "stdout", stdout)
    with output.dropped_if_unread():
        with output.dropped_if_unread():  # a launcher's, in a command's
            print("starting", flush=True)
            _show(io.BytesIO(b"".join(LINES)), tmp_path / "rank_0.log")
    assert sys.stdout is stdout
    assert (tmp_path / "rank_0.log").read_bytes().splitlines(keepends=True) == LINES
    if read is not None:
        os.close(read)  # the thread that waits for it ends
    with contextlib.suppress(OSError):
        stdout.close()


def test_what_is_read_comes_whole_and_in_order(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with output.dropped_if_unread():
            for number in range(500):
                print("é", number)
            sys.stdout.buffer.write(b"bytes\n")
            print("no end of line", end="")
    with os.fdopen(read, "rb") as reader:
        wanted = "".join(f"é {n}\n" for n in range(500)) + "bytes\nno end of line"
        assert reader.read().decode() == wanted


@pytest.mark.parametrize(
    ("output_is", "code", "errors"),
    [
        ("exec > >(true); wait $!", 141, ""),  # a reader who has gone away
        (
            "exec >/dev/full",
            1,
            "error: the output cannot be written: No space left on device\n",
        ),
        ("exec >&- 2>&-", 0, ""),  # closed
    ],
)
def test_a_command_that_only_answers_ends_quietly_when_nobody_listens(
    output_is, code, errors, tmp_path
):
    run_folder(tmp_path / "run")
    # Buffered, as usual: what could not be written would be tried again at exit.
    command = f"unset PYTHONUNBUFFERED; exec {sys.executable} -m megatron_fp16rl.cli status --json"
    shell = f"{output_is}; {command} --root {tmp_path}"
    done = answer(["bash", "-c", shell], 120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, errors)
