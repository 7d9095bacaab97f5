"""Learner ranks that are killed, stopped or hang, full disks, damaged checkpoints: nothing is lost.

Runs learn from recorded samples, so they need no servers, and equal runs have equal metrics.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from launch import outcome
from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.recipe import load
from tests.conftest import ROOT, run_ranks, skip
from tests.runs import replay, steps_of

RECIPE = "recipes/tiny/dense-grpo-fp16.yaml"
NAME = "tiny-dense-grpo-fp16"
STEPS = 16


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Settings of a run that learns from samples drawn by chance."""
    settings = replay(tmp_path_factory.mktemp("recorded"), STEPS)
    return [*settings, "gates=[]", "checkpoint.every=4"]


class Run:
    """A run that is under way."""

    def __init__(self, root, *arguments):
        self.folder, self.output = root / NAME, root.parent / f"{root.name}.txt"
        with self.output.open("w") as file:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "megatron_fp16rl.cli", "train", *map(str, arguments)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @classmethod
    def of(cls, root, settings, *more):
        """A new run in `root`."""
        settings = [*settings, *more, f"trainer.run_root={root}"]
        return cls(root, RECIPE, *(f"--set={setting}" for setting in settings))

    @property
    def rows(self):
        return steps_of(self.folder)

    @property
    def attempts(self):
        return sorted(self.folder.glob("logs/attempt_*"))

    def rank(self, number):
        """A rank's process."""
        for process in psutil.Process(self.launcher.pid).children():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number):
                    return process
        raise AssertionError(f"there is no rank {number}")

    def wait_for(self, condition, seconds=300):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.launcher.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def end(self, seconds=300):
        """Waits for it; returns its exit code and what it said."""
        try:
            return self.launcher.wait(seconds), self.output.read_text()
        finally:
            self.launcher.kill()


def learnt(rows):
    """Rows without what depends on the clock or on where a run was started."""
    unlike = ("time/", "sync/verified")
    return [{k: v for k, v in row.items() if not k.startswith(unlike)} for row in rows]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small file system of its own."""
    folder = tmp_path_factory.mktemp("disk") / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        skip(f"mounting wants root: {done.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], timeout=30, check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


@pytest.fixture(scope="module")
def whole(recorded, tmp_path_factory):
    """The metrics of a run that is left alone."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = {"folder": str(folder), "recipe": RECIPE, "settings": recorded}
    assert run_ranks(2, "resuming.replayed_run", **arguments) == ["", ""]
    return learnt(steps_of(folder))


def test_a_full_or_read_only_disk_stops_a_run_which_goes_on_and_says_where_it_hangs(
    recorded, whole, disk
):
    run = Run.of(disk, recorded)
    run.wait_for(lambda: len(run.rows) >= 5)  # one checkpoint is there
    ranks = [run.rank(number) for number in (0, 1)]
    for rank in ranks:  # else they may be done before the disk is full
        rank.suspend()
    fill(disk)
    for rank in ranks:
        rank.resume()
    code, said = run.end()
    assert code == 1, said
    assert f"no space left: {run.folder} has 0.0 MiB free" in said
    assert f"fp16rl train --resume {run.folder}" in said
    assert len(run.attempts) == 1, "it was not started again"
    assert outcome.read(run.folder).word == outcome.FAILED
    latest = checkpoint_files.Checkpoint((run.folder / "checkpoints" / "latest").resolve())
    assert latest.faults(latest.files()) == []

    (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], timeout=30, check=True)
    code, said = Run(disk, "--resume", run.folder).end()  # before anything starts
    assert code == 1
    assert f"{run.folder} cannot be written to: Read-only file system. Mount it" in said
    subprocess.run(["mount", "-o", "remount,rw", disk], timeout=30, check=True)
    before = len(run.rows)
    settings = ("--set=trainer.step_timeout_s=10", "--set=trainer.max_restarts=0")
    run = Run(disk, "--resume", run.folder, *settings)
    run.wait_for(lambda: len(run.attempts) == 2 and len(run.rows) > before)
    stopped = run.rank(1)
    stopped.suspend()  # it says nothing; the other, that waits for it, does
    code, said = run.end()
    assert learnt(run.rows) == whole[: len(run.rows)]
    assert code == 1
    assert "the learner hung: step " in said
    assert "rank 1 did not answer; trainer.max_restarts=0 are used up" in said
    assert not stopped.is_running()
    cause = json.loads((run.attempts[1] / "cause.json").read_text())
    assert cause["kind"] == "hang"
    assert "rank 0 stood at " in cause["cause"]
    assert "megatron_fp16rl/train.py" in cause["cause"]
    log = (run.attempts[1] / "rank_0.log").read_text()
    assert "Current thread" in log, "the watchdog's own stack"
    assert "train.py" in log
    assert outcome.read(run.folder) is None, "it died"


def test_killed_stopped_and_cut_short_a_run_goes_on_as_if_nothing_was(recorded, whole, tmp_path):
    run = Run.of(tmp_path / "runs", recorded, "checkpoint.background=true")
    run.wait_for(lambda: len(run.rows) >= 6)
    run.rank(1).kill()
    run.wait_for(lambda: len(run.attempts) == 2 and len(run.rows) >= 9)
    run.launcher.send_signal(signal.SIGUSR1)
    code, said = run.end()
    assert code == 0, said
    assert "learner rank 1 was killed by SIGKILL" in said
    assert "restart 1 of 3" in said
    assert f"fp16rl train --resume {run.folder}" in said
    cause = json.loads((run.attempts[0] / "cause.json").read_text())
    assert (cause["rank"], cause["kind"]) == (1, "killed")
    assert {"rank_0.log", "rank_1.log"} <= {file.name for file in run.attempts[0].iterdir()}
    assert not (run.attempts[1] / "cause.json").exists()
    assert outcome.read(run.folder).word == outcome.STOPPED

    done = len(run.rows)
    newest, older = checkpoint_files.available(run.folder / "checkpoints")
    assert 9 <= done < STEPS
    assert newest.step == done, "what was done is saved"
    file = max(newest.path.glob("*.distcp"), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    run = Run(tmp_path / "runs", "--resume", run.folder, "--set=trainer.max_restarts=2")
    code, said = run.end()
    assert code == 0, said
    assert "changed since the last start: trainer.max_restarts: 3 then, 2 now" in said
    assert f"{file} has" in said
    assert f"it was cut short; set aside, going on from {older.path}" in said
    assert learnt(run.rows) == whole
    assert len(run.attempts) == 3
    undone = (run.folder / "metrics.undone.jsonl").read_text().splitlines()
    assert done - older.step <= len(undone)


def test_waiting_for_servers_is_no_hang_but_what_follows_may_be(tmp_path):
    from megatron_fp16rl.models.build import model_folder

    like = str(model_folder(load(ROOT / RECIPE).model))
    with pytest.raises(AssertionError, match=r"exit codes \[86, 86\]"):
        run_ranks(2, "servers.late_server", timeout=240, folder=str(tmp_path), like=like)
    for rank in range(2):
        assert (tmp_path / f"found_{rank}").exists()
        assert "the first sync " in (tmp_path / f"rank_{rank}").read_text()
