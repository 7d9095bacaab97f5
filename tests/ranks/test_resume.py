"""A run resumed from a checkpoint equals the run that was never stopped."""

import functools
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.utils.files import read_json
from tests import models
from tests.conftest import assert_replicas_agree, run_ranks

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000}
SHARDED = {"distributed_optimizer": True}
LAYOUTS = {
    "tp2": ({"tensor_parallel": 2}, "qwen3-tied"),
    "pp2-uneven": ({"pipeline_parallel": 2, "first_stage_layers": 1}, "qwen3-deep"),
    "ep2-latent": ({"expert_parallel": 2}, "deepseek-v3"),
    "ep2-overlap": ({"expert_parallel": 2, **SHARDED, "ddp": OVERLAP}, "qwen3-moe"),
    "cp2-ep2": ({"context_parallel": 2, "expert_parallel": 2, **SHARDED}, "qwen3-moe"),
}
READ_AT = [
    ("tp2", 2, SHARDED),
    ("pp2-uneven", 2, {"tensor_parallel": 2}),
    ("ep2-latent", 2, {"tensor_parallel": 2, "sequence_parallel": True}),
    ("ep2-overlap", 2, {"pipeline_parallel": 2}),
    ("cp2-ep2", 1, {}),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By layout: arguments of a run of four updates, a checkpoint and two more; its results."""

    @functools.cache
    def run(name):
        layout, family = LAYOUTS[name]
        folder = tmp_path_factory.mktemp(name)
        # With weights of seeds 0 and 1, rounding at another layout has a token choose another expert.
        arguments = {"folder": str(folder), "family": family, "before": 4, "after": 2, "seed": 2}
        return arguments, run_ranks(2, "resuming.resume", layout=layout, **arguments)

    return run


def test_a_checkpoint_before_the_first_update_changes_none(tmp_path):
    """As a run saves whose first updates were all skipped."""
    ((saved, plain),) = run_ranks(1, "resuming.saved_before_any_update", folder=str(tmp_path))
    assert saved == plain


def test_resume_is_exact_to_the_last_bit(saved):
    """Experts, a sharded optimizer, parameters that are gathered late; test_train.py has whole runs."""
    arguments, first = saved("ep2-overlap")
    second = run_ranks(2, "resuming.resume", layout=LAYOUTS["ep2-overlap"][0], **arguments)
    progress = {"step": 4, "version": 4, "tokens": 7, "accuracy_before": 0.25}
    for whole, resumed in zip(first, second, strict=True):
        assert resumed["progress"] == progress
        for what in ("log", "shards", "scaler", "at_checkpoint"):
            assert resumed[what] == whole[what], what
        assert resumed["scaler"]["skipped_total"] == 1
    assert_replicas_agree([result["shards"] for result in second])


def test_a_checkpoint_in_the_background_is_the_same_and_whole_or_not_at_all(tmp_path):
    """Whatever the learner does meanwhile; a writer that is killed, or has no space, is named on every rank."""
    layout, family = {"expert_parallel": 2, **SHARDED}, "qwen3-moe"
    arguments = {"folder": str(tmp_path), "layout": layout, "family": family}
    results = run_ranks(2, "resuming.saved_in_background", **arguments)
    for result in results:
        assert result["same_generators"]
        # Two more files differ: torch's index, with a random number and the folder's name, and those of the
        # generators in the order of their names.
        saved, later = (
            {n: d for n, d in result[when].items() if n != ".metadata" and "rng/" not in n}
            for when in ("at_once", "later")
        )
        assert set(result["at_once"]) == set(result["later"])
        assert {name for name in saved if name.endswith(".distcp")} == {
            f"__{r}_0.distcp" for r in "01"
        }
        assert saved == later
        killed, full = result["said"]
        assert "NotWritten: the process that wrote rank 1's part of" in killed
        assert "later/step_2 was killed by SIGKILL, so there is none" in killed
        assert f"fp16rl train --resume {tmp_path}" in killed
        assert "File too large" in full
        assert "_0.distcp" in full
        assert result["between"] == [1], "nothing is removed before a newer one is whole"
        assert result["steps"] == [4]
        assert result["faults"] == [[]]
        assert result["leftovers"] == []


@pytest.mark.parametrize(
    ("name", "ranks", "layout"), READ_AT, ids=lambda v: v if isinstance(v, str) else None
)
def test_checkpoint_loads_at_another_layout(name, ranks, layout, saved):
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


def flip_a_bit(checkpoint):
    file = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def forget_the_optimizer(checkpoint):
    (checkpoint / "state.json").unlink()
    files = read_json(checkpoint / "manifest.json")["files"]
    del files["state.json"]
    models.edit_json(checkpoint / "manifest.json", files=files)


def plant_code(checkpoint):
    index = checkpoint / ".metadata"
    index.write_bytes(pickle.dumps(os.system))
    files = read_json(checkpoint / "manifest.json")["files"]
    files[".metadata"] = checkpoint_files.digest(index)
    models.edit_json(checkpoint / "manifest.json", files=files)


@pytest.mark.parametrize(
    ("change", "family", "said"),
    [
        (flip_a_bit, "qwen3-tied", r"\.distcp is not what was written: its checksum differs"),
        (forget_the_optimizer, "qwen3-tied", "parameters only, no optimizer: it cannot be resumed"),
        (plant_code, "qwen3-tied", r"\.metadata holds posix\.system"),
        (lambda _: None, "qwen3", "of another model .*tie_word_embeddings: True there, False here"),
    ],
    ids=["flipped", "without optimizer", "code", "another model"],
)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused_by_every_rank(
    saved, tmp_path, change, family, said
):
    arguments, _ = saved("tp2")
    shutil.copytree(f"{arguments['folder']}/step_4", tmp_path / "step_4")
    change(tmp_path / "step_4")
    arguments = {**arguments, "folder": str(tmp_path), "family": family}
    for result in run_ranks(2, "resuming.resume", layout=LAYOUTS["tp2"][0], **arguments):
        assert re.search(said, result["refused"], re.S), result
