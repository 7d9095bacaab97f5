"""A run that goes on from a checkpoint is the run that was never stopped."""

import errno
import functools
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.learner.checkpoint_files import CheckpointError, Damaged
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.tools import convert
from megatron_fp16rl.tools.evaluate import Subject
from megatron_fp16rl.utils.files import read_json, write_json
from tests import models
from tests.conftest import assert_replicas_agree, python, run_ranks

DENSE, MOE, LATENT, DEEP = "qwen3-tied", "qwen3-moe", "deepseek-v3", "qwen3-deep"
LAYOUTS = {
    "dp2-distributed-optimizer": ({"distributed_optimizer": True}, DENSE),
    "tp2": ({"tensor_parallel": 2}, DENSE),
    "pp2": ({"pipeline_parallel": 2}, DENSE),
    "pp2-uneven": ({"pipeline_parallel": 2, "first_stage_layers": 1}, DEEP),
    "ep2": ({"expert_parallel": 2}, MOE),
    "ep2-latent": ({"expert_parallel": 2}, LATENT),
    "ep2-distributed-optimizer": ({"expert_parallel": 2, "distributed_optimizer": True}, MOE),
}
READ_AT = [
    ("dp2-distributed-optimizer", 1, {}),
    ("tp2", 1, {}),
    ("tp2", 2, {"distributed_optimizer": True}),
    ("pp2", 1, {}),
    ("pp2", 2, {"tensor_parallel": 2}),
    ("pp2-uneven", 2, {"pipeline_parallel": 2}),
    ("ep2", 1, {}),
    ("ep2-latent", 2, {"tensor_parallel": 2, "sequence_parallel": True}),
    ("ep2-distributed-optimizer", 2, {"pipeline_parallel": 2}),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By layout: arguments of a run of five updates, a checkpoint and three more; its results."""

    @functools.cache
    def run(name):
        layout, family = LAYOUTS[name]
        folder = tmp_path_factory.mktemp(name)
        arguments = {"folder": str(folder), "family": family, "before": 5, "after": 3}
        return arguments, run_ranks(2, "resuming.resume", layout=layout, **arguments)

    return run


def test_a_resumed_learner_goes_on_to_the_last_bit(saved):
    """Experts under the distributed optimizer; test_train.py has whole runs at other layouts."""
    name = "ep2-distributed-optimizer"
    arguments, first = saved(name)
    second = run_ranks(2, "resuming.resume", layout=LAYOUTS[name][0], **arguments)
    progress = {"step": 5, "version": 5, "tokens": 7, "accuracy_before": 0.25}
    for whole, resumed in zip(first, second, strict=True):
        assert resumed["progress"] == progress
        for what in ("log", "shards", "scaler", "at_checkpoint"):
            assert resumed[what] == whole[what], what
        assert resumed["scaler"]["skipped_total"] == 1
    assert_replicas_agree([result["shards"] for result in second])


@pytest.mark.parametrize(
    ("name", "ranks", "layout"), READ_AT, ids=lambda v: v if isinstance(v, str) else None
)
def test_a_checkpoint_is_read_at_another_layout(name, ranks, layout, saved):
    """The same weights and scale to the last bit; then the same updates but for rounding."""
    arguments, first = saved(name)
    resumed = run_ranks(ranks, "resuming.resume", layout=layout, **arguments)[0]
    assert resumed["at_checkpoint"] == first[0]["at_checkpoint"]
    for (loss, stepped, norm, lr), expected in zip(resumed["log"], first[0]["log"], strict=True):
        assert (stepped, lr) == (expected[1], expected[3])
        assert loss == pytest.approx(expected[0], rel=1e-4)
        assert norm == pytest.approx(expected[2], rel=5e-3)
    apart = np.abs(np.subtract(resumed["weights"], first[0]["weights"]))
    assert apart.max() < 2e-3
    assert apart.mean() < 1e-5


def test_a_run_killed_twenty_times_loses_nothing(tmp_path):
    """SIGKILL at random moments, most of them within a checkpoint, of one rank or of both."""
    done = python("-m", "tests.killed", tmp_path, 20, timeout=300)
    result = json.loads(done.stdout)
    steps = [step for step, _, _ in result["seen"]]
    assert steps == sorted(set(steps)), "every attempt went on where the one before had come to"
    assert all(faults == [] for _, faults, _ in result["seen"]), "latest was never half-written"
    assert sum(half for _, _, half in result["seen"]) > 5, "the kills did hit checkpoints"
    alone = dict(result["alone"])
    assert len(alone) == steps[-1] + 2
    assert {step for step, _ in result["killed"]} == set(alone)
    for step, loss in result["killed"]:
        assert loss == alone[step]


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_cannot_be_resumed_is_refused_with_the_remedy(saved, tmp_path):
    """A flipped bit, on every rank alike; another model."""
    arguments, _ = saved("tp2")
    run = tmp_path / "run" / "checkpoints"
    for step in (3, 5):
        shutil.copytree(f"{arguments['folder']}/step_5", run / f"step_{step}")
        manifest = run / f"step_{step}" / "manifest.json"
        write_json(manifest, {**read_json(manifest), "step": step})
    largest = max((run / "step_5").glob("*.distcp"), key=lambda f: f.stat().st_size)
    flip_a_byte(largest)
    arguments = {**arguments, "folder": str(run)}
    for result in run_ranks(2, "resuming.resume", layout=LAYOUTS["tp2"][0], **arguments):
        assert f"{largest} is not what was written: its checksum differs" in result["refused"]
        assert f"fp16rl train --resume {run.parent} --at 3" in result["refused"]
    (run / "step_5" / "manifest.json").write_text("")
    for result in run_ranks(2, "resuming.resume", layout=LAYOUTS["tp2"][0], **arguments):
        assert "step_5/manifest.json is not what was written" in result["refused"]
        assert f"fp16rl train --resume {run.parent} --at 3" in result["refused"]
    shutil.rmtree(run / "step_5")
    (other,) = run_ranks(1, "resuming.resume", layout={}, **{**arguments, "family": "qwen3"})
    assert "is of another model than the recipe's" in other["refused"]
    assert "tie_word_embeddings: True there, False here" in other["refused"]


def forget(checkpoint, name):
    """Removes a file from a checkpoint and from its manifest."""
    (checkpoint / name).unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"][name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_parameters_alone_and_strange_pickles_are_refused(saved, tmp_path):
    arguments, _ = saved("tp2")
    arguments = {**arguments, "folder": str(tmp_path)}
    shutil.copytree(f"{saved('tp2')[0]['folder']}/step_5", tmp_path / "step_5")
    forget(tmp_path / "step_5", "state.json")
    (result,) = run_ranks(1, "resuming.resume", layout={}, **arguments)
    assert "holds parameters only, no optimizer: it cannot be resumed" in result["refused"]
    index = tmp_path / "step_5" / ".metadata"
    index.write_bytes(pickle.dumps(os.system))
    manifest = json.loads((tmp_path / "step_5" / "manifest.json").read_text())
    manifest["files"][".metadata"] = checkpoint_files.digest(index)
    (tmp_path / "step_5" / "manifest.json").write_text(json.dumps(manifest))
    (result,) = run_ranks(1, "resuming.resume", layout={}, **arguments)
    assert ".metadata holds posix.system" in result["refused"]


@pytest.fixture
def run(tmp_path):
    """Checkpoints at steps 10 to 50 of a run, as far as files go."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30, 40, 50):
        temporary = checkpoint_files.begin(folder, step)
        (temporary / "tensors").write_bytes(bytes(range(200)))
        checkpoint_files.commit(
            temporary, step, {"tensors": checkpoint_files.digest(temporary / "tensors")}
        )
    return folder


def test_a_checkpoint_that_was_asked_for_and_is_cut_short_is_refused(run):
    """The one before is offered. Where none was asked for, see test_supervise.py."""
    newest = checkpoint_files.available(run)[0]
    assert newest.step == 50
    assert newest.faults(newest.files()) == []
    (newest.path / "tensors").write_bytes(bytes(range(100)))
    (run / "step_40" / "manifest.json").write_text('{"step": 40, "fil')
    (run.parent / "recipe.yaml").write_text(models.recipe().to_yaml())

    def resume(*arguments):
        command = ["-m", "megatron_fp16rl.cli", "train", "--resume", run.parent, *arguments]
        done = python(*command, check=False)
        assert done.returncode == 1
        assert "step_50/tensors has 100 bytes, not 200: it was cut short" in done.stderr
        return done.stderr

    assert f"fp16rl train --resume {run.parent} --at 30" in resume("--at", 50)
    for step in (10, 20, 30):
        (run / f"step_{step}" / "tensors").unlink()
    assert "There is no earlier one that is: start anew" in resume()
    assert not (run.parent / "logs").exists(), "nothing was started"


MANIFEST = {"step": 50, "files": {"tensors": {"bytes": 200, "sha256": "0"}}}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"7", b"\xff\x00", b"{}", b'{"step": 50}'),
        *(b'{"step": 50, "files": ' + files + b"}" for files in (b"null", b"[]", b"3", b"{}")),
        b'{"step": 50, "files": {"tensors": {}}}',
        b'{"step": 50, "files": {"tensors": 3}}',
        b'{"step": 50, "files": {"tensors": {"bytes": "many", "sha256": "0"}}}',
        json.dumps(MANIFEST).encode("utf-16"),
        json.dumps({**MANIFEST, "step": 30}).encode(),  # renamed
        *("missing", "folder", "dangling"),
    ],
)
def test_a_damaged_manifest_is_a_damaged_checkpoint_and_the_one_before_is_offered(content, run):
    manifest = run / "step_50" / "manifest.json"
    manifest.unlink()
    if content == "folder":
        manifest.mkdir()
    elif content == "dangling":
        manifest.symlink_to("nowhere")
    elif content != "missing":
        manifest.write_bytes(content)
    newest, *others = checkpoint_files.available(run)
    (fault,) = newest.faults()
    assert str(newest.path) in fault
    assert len(fault) < 300
    assert not any(checkpoint.faults() for checkpoint in others)
    refusal = checkpoint_files.refusal(newest, [fault])
    assert isinstance(refusal, Damaged)
    assert f"fp16rl train --resume {run.parent} --at 40" in str(refusal)


def test_an_unfinished_run_is_evaluated_by_its_newest_whole_checkpoint(run, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(convert, "to_hugging_face", lambda found, _: written.append(found.name))
    (tmp_path / "recipe.yaml").write_text(models.recipe().to_yaml())
    (run / "step_50" / "manifest.json").unlink()
    (run / "step_40" / "tensors").unlink()
    said = []
    Subject.find(tmp_path, None, said.append)
    assert written == ["step_30"]
    assert "step_50/manifest.json cannot be read: No such file" in said[0]
    assert "step_40/tensors is missing" in said[0]
    for step in (10, 20, 30):
        (run / f"step_{step}" / "manifest.json").write_text("")
    with pytest.raises(RecipeError, match=r"neither an export/ nor a whole checkpoint; .*step_50"):
        Subject.find(tmp_path, None)


def test_what_people_and_file_systems_leave_beside_checkpoints_is_no_checkpoint(run, monkeypatch):
    for name in (
        "step_50~",
        "step_60.bak",
        "step_abc",
        "step_070",
        "step_80 (copy)",
        ".step_90.old",
    ):
        shutil.copytree(run / "step_50", run / name)
    (run / "step_99").write_text("a file")
    (run / "step_98").symlink_to("nowhere")
    (run / ".step_50.swp").write_text("an editor's")
    (run / "latest").unlink()
    shutil.copytree(run / "step_50", run / "latest")  # cp -rL
    assert [c.step for c in checkpoint_files.available(run)] == [50, 40, 30, 20, 10]
    for step in (98, 99):
        temporary = checkpoint_files.begin(run, step)
        (temporary / "tensors").write_bytes(b"1")
        checkpoint_files.commit(
            temporary, step, {"tensors": checkpoint_files.digest(temporary / "tensors")}
        )
    assert [c.step for c in checkpoint_files.available(run)][:3] == [99, 98, 50]
    assert os.readlink(run / "latest") == "step_99"
    assert not list(run.glob(".step*"))
    (run / "latest").unlink()
    checkpoint_files.set_aside_after(run, 50)
    assert os.readlink(run / "latest") == "step_50"


def test_what_a_file_system_holds_on_to_is_removed_the_next_time(run, monkeypatch):
    """NFS keeps a file that is open as .nfs..., and refuses to remove its folder."""
    with monkeypatch.context() as nfs:
        nfs.setattr(os, "rmdir", busy)
        checkpoint_files.prune(run, keep_last=2, keep_every=None)
        assert [c.step for c in checkpoint_files.available(run)] == [50, 40]
        shutil.copytree(run / "step_40", run / "step_30")
        checkpoint_files.prune(run, keep_last=2, keep_every=None)
    assert list(run.glob(".step_*.old.*"))
    checkpoint_files.begin(run, 60)
    assert not list(run.glob(".step_*.old.*"))


def busy(*_, **__):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def test_old_checkpoints_go_and_those_to_keep_stay(run):
    half = checkpoint_files.begin(run, 60)
    checkpoint_files.prune(run, keep_last=2, keep_every=20)
    assert [c.step for c in checkpoint_files.available(run)] == [50, 40, 20]
    assert half.exists()
    checkpoint_files.begin(run, 70)
    assert not half.exists(), "what a killed run left is removed"
    assert (run / "latest").resolve() == (run / "step_50").resolve()


def test_newer_checkpoints_are_set_aside_not_lost(run):
    checkpoint_files.set_aside_after(run, 20)
    assert [c.step for c in checkpoint_files.available(run)] == [20, 10]
    assert (run / "latest").resolve() == (run / "step_20").resolve()
    assert sorted(p.name for p in run.glob("set_aside/*/*")) == ["step_30", "step_40", "step_50"]
    with pytest.raises(CheckpointError, match=r"no checkpoint at step 25; there are: 10, 20"):
        checkpoint_files.set_aside_after(run, 25)
