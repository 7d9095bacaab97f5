"""Checkpoints on disk: which are intact, which are refused, which are removed. No tensors, no ranks."""

import errno
import json
import os
import shutil

import pytest

from megatron_fp16rl.cli.common import resumable
from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.learner.checkpoint_files import (
    CheckpointError,
    Damaged,
    available,
    begin,
    commit,
    digest,
    prune,
    set_aside_after,
)


@pytest.fixture
def run(tmp_path):
    """Checkpoints at steps 10 to 50 of a run, as far as files go."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30, 40, 50):
        write(folder, step)
    return folder


def write(folder, step):
    temporary = begin(folder, step)
    (temporary / "tensors").write_bytes(bytes(range(200)))
    digests = {"tensors": digest(temporary / "tensors")}
    commit(temporary, step, digests)


def test_truncated_checkpoint_is_refused_on_resume(run):
    """The one before is offered. Without --at, see test_supervise.py."""
    newest = available(run)[0]
    assert newest.step == 50
    assert newest.faults(newest.files()) == []
    (newest.path / "tensors").write_bytes(bytes(range(100)))
    (run / "step_40" / "manifest.json").write_text('{"step": 40, "fil')
    fault = "step_50/tensors has 100 bytes, not 200: it was cut short"
    with pytest.raises(Damaged, match=f"{fault}.*--resume {run.parent} --at 30"):
        resumable(run.parent, 50)
    assert resumable(run.parent) == run.parent  # without --at the one before will do
    for step in (10, 20, 30):
        (run / f"step_{step}" / "tensors").unlink()
    with pytest.raises(Damaged, match=f"{fault}.*There is no earlier one that is: start anew"):
        resumable(run.parent)


MANIFEST = {"step": 50, "files": {"tensors": {"bytes": 200, "sha256": "0"}}}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff\x00", b'{"step": 50}', b'{"step": 50, "files": {}}'),
        b'{"step": 50, "files": {"tensors": {"bytes": "many", "sha256": "0"}}}',
        json.dumps({**MANIFEST, "step": 30}).encode(),  # renamed
        *("missing", "folder", "dangling"),
    ],
)
def test_damaged_manifest_is_refused_and_the_checkpoint_before_offered(content, run):
    manifest = run / "step_50" / "manifest.json"
    manifest.unlink()
    if content == "folder":
        manifest.mkdir()
    elif content == "dangling":
        manifest.symlink_to("nowhere")
    elif content != "missing":
        manifest.write_bytes(content)
    newest, *others = available(run)
    (fault,) = newest.faults()
    assert str(newest.path) in fault
    assert len(fault) < 300
    assert not any(checkpoint.faults() for checkpoint in others)
    refusal = checkpoint_files.refusal(newest, [fault])
    assert isinstance(refusal, Damaged)
    assert f"fp16rl train --resume {run.parent} --at 40" in str(refusal)


def test_leftovers_of_people_and_file_systems_are_no_checkpoints(run, monkeypatch):
    for name in ("step_50~", "step_60.bak", "step_abc", "step_070", ".step_90.old"):
        shutil.copytree(run / "step_50", run / name)
    (run / "step_99").write_text("a file")
    (run / "step_98").symlink_to("nowhere")
    (run / ".step_50.swp").write_text("an editor's")
    (run / "latest").unlink()
    shutil.copytree(run / "step_50", run / "latest")  # cp -rL
    assert [c.step for c in available(run)] == [50, 40, 30, 20, 10]
    for step in (98, 99):
        write(run, step)
    assert [c.step for c in available(run)][:3] == [99, 98, 50]
    assert os.readlink(run / "latest") == "step_99"
    assert not list(run.glob(".step*"))
    (run / "latest").unlink()
    set_aside_after(run, 50)
    assert os.readlink(run / "latest") == "step_50"


def test_busy_files_are_removed_the_next_time(run, monkeypatch):
    """NFS keeps a file that is open as .nfs..., and refuses to remove its folder."""
    with monkeypatch.context() as nfs:
        nfs.setattr(os, "rmdir", busy)
        prune(run, keep_last=2, keep_every=None)
        assert [c.step for c in available(run)] == [50, 40]
        shutil.copytree(run / "step_40", run / "step_30")
        prune(run, keep_last=2, keep_every=None)
    assert list(run.glob(".step_*.old.*"))
    begin(run, 60)
    assert not list(run.glob(".step_*.old.*"))


def busy(*_, **__):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def test_prune_keeps_the_last_and_every_nth(run):
    half = begin(run, 60)
    prune(run, keep_last=2, keep_every=20)
    assert [c.step for c in available(run)] == [50, 40, 20]
    assert half.exists()
    begin(run, 70)
    assert not half.exists(), "what a killed run left is removed"
    assert (run / "latest").resolve() == (run / "step_50").resolve()


def test_newer_checkpoints_are_set_aside_not_removed(run):
    set_aside_after(run, 20)
    assert [c.step for c in available(run)] == [20, 10]
    assert (run / "latest").resolve() == (run / "step_20").resolve()
    assert sorted(p.name for p in run.glob("set_aside/*/*")) == ["step_30", "step_40", "step_50"]
    with pytest.raises(CheckpointError, match=r"no checkpoint at step 25; there are: 10, 20"):
        set_aside_after(run, 25)
