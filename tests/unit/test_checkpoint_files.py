"""Checkpoints on disk: which are intact, which are refused, which are removed. No tensors, no ranks."""

import errno
import json
import os
import shutil

import pytest

from megatron_fp16rl.cli.common import resumable
from megatron_fp16rl.learner import checkpoint_files as files
from tests.unit.damage import DAMAGE, put


@pytest.fixture
def run(tmp_path):
    """Checkpoints at steps 10 to 50 of a run, as far as files go."""
    for step in (10, 20, 30, 40, 50):
        write(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def write(folder, step):
    temporary = files.begin(folder, step)
    (temporary / "tensors").write_bytes(bytes(range(200)))
    files.commit(temporary, step, {"tensors": files.digest(temporary / "tensors")})


def steps(run):
    return [checkpoint.step for checkpoint in files.available(run)]


def test_truncated_checkpoint_is_refused_on_resume(run):
    """The one before is offered. Without --at, see test_supervise.py."""
    newest = files.available(run)[0]
    assert newest.step == 50
    assert newest.faults(newest.files()) == []
    (newest.path / "tensors").write_bytes(bytes(range(100)))
    (run / "step_40" / "manifest.json").write_text('{"step": 40, "fil')
    fault = "step_50/tensors has 100 bytes, not 200: it was cut short"
    with pytest.raises(files.Damaged, match=f"{fault}.*--resume {run.parent} --at 30"):
        resumable(run.parent, 50)
    assert resumable(run.parent) == run.parent  # without --at the one before will do
    for step in (10, 20, 30):
        (run / f"step_{step}" / "tensors").unlink()
    with pytest.raises(files.Damaged, match=f"{fault}.*no earlier one that is: start anew"):
        resumable(run.parent)


MANIFEST = {"step": 50, "files": {"tensors": {"bytes": 200, "sha256": "0"}}}
NOT_WRITTEN = [
    *({}, {"step": 50}, {**MANIFEST, "files": {}}),
    {**MANIFEST, "files": {"tensors": {"bytes": "many", "sha256": "0"}}},
    {**MANIFEST, "step": 30},  # renamed
]


@pytest.mark.parametrize("how", [*DAMAGE, *map(json.dumps, NOT_WRITTEN)])
def test_damaged_manifest_is_refused_and_the_checkpoint_before_offered(how, run):
    manifest = run / "step_50" / "manifest.json"
    DAMAGE[how](manifest) if how in DAMAGE else put(manifest, how.encode())
    newest, *others = files.available(run)
    (fault,) = newest.faults()
    assert str(newest.path) in fault
    assert len(fault) < 300
    assert not any(checkpoint.faults() for checkpoint in others)
    refusal = files.refusal(newest, [fault])
    assert isinstance(refusal, files.Damaged)
    assert f"fp16rl train --resume {run.parent} --at 40" in str(refusal)


def test_leftovers_of_people_and_file_systems_are_no_checkpoints(run):
    for name in ("step_50~", "step_60.bak", "step_abc", "step_070", ".step_90.old"):
        shutil.copytree(run / "step_50", run / name)
    (run / "step_99").write_text("a file")
    (run / "step_98").symlink_to("nowhere")
    (run / ".step_50.swp").write_text("an editor's")
    (run / "latest").unlink()
    shutil.copytree(run / "step_50", run / "latest")  # cp -rL
    assert steps(run) == [50, 40, 30, 20, 10]
    for step in (98, 99):
        write(run, step)
    assert steps(run)[:3] == [99, 98, 50]
    assert os.readlink(run / "latest") == "step_99"
    assert not list(run.glob(".step*"))
    (run / "latest").unlink()
    files.set_aside_after(run, 50)
    assert os.readlink(run / "latest") == "step_50"


def test_busy_files_are_removed_the_next_time(run, monkeypatch):
    """NFS keeps a file that is open as .nfs..., and refuses to remove its folder."""

    def busy(*_, **__):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as nfs:
        nfs.setattr(os, "rmdir", busy)
        files.prune(run, keep_last=2, keep_every=None)
        assert steps(run) == [50, 40]
        shutil.copytree(run / "step_40", run / "step_30")
        files.prune(run, keep_last=2, keep_every=None)
    assert list(run.glob(".step_*.old.*"))
    files.begin(run, 60)
    assert not list(run.glob(".step_*.old.*"))


def test_prune_keeps_the_last_and_every_nth(run):
    half = files.begin(run, 60)
    files.prune(run, keep_last=2, keep_every=20)
    assert steps(run) == [50, 40, 20]
    assert half.exists()
    files.begin(run, 70)
    assert not half.exists(), "what a killed run left is removed"
    assert (run / "latest").resolve() == (run / "step_50").resolve()


def test_newer_checkpoints_are_set_aside_not_removed(run):
    files.set_aside_after(run, 20)
    assert steps(run) == [20, 10]
    assert os.readlink(run / "latest") == "step_20"
    assert sorted(p.name for p in run.glob("set_aside/*/*")) == ["step_30", "step_40", "step_50"]
    with pytest.raises(files.CheckpointError, match=r"no checkpoint at step 25; there are: 10, 20"):
        files.set_aside_after(run, 25)
