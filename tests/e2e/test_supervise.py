"""Learner ranks that are killed, stopped or hang, full disks, damaged checkpoints: nothing is lost.

Runs learn from recorded samples, so they need no servers, and equal runs have equal metrics.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from launch import outcome
from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import load
from tests.conftest import ROOT, forker, run_ranks, skip
from tests.runs import TINY, Run, fp16rl, learnt, make_run, replay, wait_for

STEPS = 24


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Settings of a run that learns from samples drawn by chance."""
    settings = replay(tmp_path_factory.mktemp("recorded"), STEPS)
    return [*settings, "gates=[]", "checkpoint.every=4"]


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
    assert make_run(folder, TINY, recorded) == ["", ""]
    return learnt(folder)


def test_a_full_or_read_only_disk_stops_a_run_which_goes_on_from_what_is_there(
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
    refused = fp16rl("train", "--resume", run.folder, code=1)
    subprocess.run(["mount", "-o", "remount,rw", disk], timeout=30, check=True)
    expected = f"{run.folder} cannot be written to: Read-only file system. Mount it"
    assert expected in refused.output.replace("\n", " ")
    assert make_run(run.folder, TINY, recorded) == ["", ""]
    assert learnt(run.folder) == whole


def test_hung_stopped_and_cut_short_a_run_goes_on_as_if_nothing_was(recorded, whole, tmp_path):
    settings = [*recorded, "checkpoint.background=true", "trainer.step_timeout_s=15"]
    run = Run.of(tmp_path / "runs", settings)
    run.wait_for(lambda: len(run.rows) >= 6)
    stopped = run.rank(1)
    stopped.suspend()  # it says nothing; the other, that waits for it, does
    run.wait_for(lambda: len(run.attempts) == 2 and len(run.rows) >= 9)
    run.launcher.send_signal(signal.SIGUSR1)
    code, said = run.end()
    assert code == 0, said
    assert "the learner hung: step " in said
    assert "rank 1 did not answer" in said
    assert not stopped.is_running()
    assert "restart 1 of 3" in said
    assert f"fp16rl train --resume {run.folder}" in said
    cause = json.loads((run.attempts[0] / "cause.json").read_text())
    assert (cause["rank"], cause["kind"]) == (0, "hang")
    assert "rank 0 stood at " in cause["cause"]
    assert "megatron_fp16rl/train.py" in cause["cause"]
    assert {"rank_0.log", "rank_1.log"} <= {file.name for file in run.attempts[0].iterdir()}
    log = (run.attempts[0] / "rank_0.log").read_text()
    assert "Current thread" in log, "the watchdog's own stack"
    assert "train.py" in log
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
    assert learnt(run.folder) == whole
    assert len(run.attempts) == 3
    undone = (run.folder / "metrics.undone.jsonl").read_text().splitlines()
    assert done - older.step <= len(undone)


def newest(folder):
    """The step of the newest checkpoint."""
    checkpoints = checkpoint_files.available(folder / "checkpoints")
    return checkpoints[0].step if checkpoints else 0


def stop_in_a_checkpoint(folder, ranks, draw):
    """Stops the ranks at a moment at which a checkpoint is half written."""
    while True:
        time.sleep(draw.uniform(0, 0.02))
        for rank in ranks:
            rank.suspend()
        # Looked for while all stand still: a checkpoint is done within milliseconds.
        if list((folder / "checkpoints").glob(".step_*")):
            return
        for rank in ranks:
            rank.resume()


def test_killed_again_and_again_a_run_loses_nothing(recorded, whole, tmp_path):
    """SIGKILL of both ranks, at once or one after the other, within a checkpoint and at other times."""
    draw, settings = random.Random(0), [*recorded, "checkpoint.every=1"]
    for kill in range(4):
        before = newest(tmp_path)
        with ThreadPoolExecutor(1) as thread:
            run = thread.submit(make_run, tmp_path, TINY, settings)
            wait_for(lambda before=before: newest(tmp_path) > before, 120, "a checkpoint")
            ranks = psutil.Process(forker().pid).children()
            if kill % 2:
                stop_in_a_checkpoint(tmp_path, ranks, draw)
            else:
                time.sleep(draw.uniform(0, 0.2))
            draw.shuffle(ranks)
            for rank in ranks:
                rank.kill()
                time.sleep(draw.choice((0, 0.1)))
            with pytest.raises(AssertionError, match="exit codes"):
                run.result()
        assert bool(list((tmp_path / "checkpoints").glob(".step_*"))) or not kill % 2
        latest = checkpoint_files.Checkpoint((tmp_path / "checkpoints" / "latest").resolve())
        assert latest.faults(latest.files()) == [], "it was never half written"
    assert make_run(tmp_path, TINY, settings) == ["", ""]
    assert learnt(tmp_path) == whole


def test_waiting_for_servers_is_no_hang_but_what_follows_may_be(tmp_path):
    like = str(model_folder(load(ROOT / TINY).model))
    with pytest.raises(AssertionError, match=r"exit codes \[86, 86\]"):
        run_ranks(2, "servers.late_server", timeout=240, folder=str(tmp_path), like=like)
    for rank in range(2):
        assert (tmp_path / f"found_{rank}").exists()
        assert "the first sync " in (tmp_path / f"rank_{rank}").read_text()
