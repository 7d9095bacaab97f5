"""Rehearsals, run: they prove what they say, and notice damage."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools.rehearse import checks
from megatron_fp16rl.tools.rehearse.resume import resumed
from megatron_fp16rl.tools.rehearse.run import started_with
from tests.conftest import ROOT
from tests.runs import fp16rl

DENSE = ROOT / "recipes/dense/qwen3-14b-dapo-fp16-4n8g.yaml"
EXPERTS = ROOT / "recipes/moe/qwen3-30b-a3b-dapo-fp16-4n8g.yaml"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The result for a recipe that ships: Qwen3-30B-A3B, DAPO with router replay; with fewer processes."""
    fewer = ["learner.pipeline_parallel=1", "rollout.servers=1"]
    options = ["--ranks", 2, *(word for setting in fewer for word in ("--set", setting))]
    root = tmp_path_factory.mktemp("experts")
    return json.loads(fp16rl("rehearse", EXPERTS, "--root", root, "--json", *options).stdout)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_is_rehearsed(rehearsed):
    """By what its run left on disk, and not by what it says of itself."""
    assert (rehearsed["ok"], rehearsed["reason"], rehearsed["ranks"]) == (True, None, 2)
    run = Path(rehearsed["folder"]) / "run"
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["sync/verified_logprob_abs_mean"] < 3e-3
        assert 0 < row["mismatch/logprob_abs_mean"] < 5e-3
        assert 0.98 < row["mismatch/router_agreement"] <= 1
    state = json.loads((run / "checkpoints" / "step_3" / "state.json").read_text())
    assert state["progress"]["step"] == 3
    assert state["schedule"]["updates"] == sum(row["updates"] for row in rows) >= 3
    assert state["layout"]["ranks"] == 2
    attempts = sorted(path.name for path in (run / "logs").iterdir())
    assert attempts == ["attempt_0", "attempt_1"], "killed once, resumed once"
    weights = load_file(run / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} <= {torch.float16, torch.float32}
    figures = {row["what"]: row["figure"] for row in rehearsed["proved"]}
    assert "processes are gone" in figures["kill"]
    assert "Adam moments follow" in figures["resume, one more step"]
    small = load(Path(rehearsed["folder"]) / "recipe.yaml")
    assert (small.learner.expert_parallel, small.rollout.tensor_parallel) == (2, 2)
    assert rehearsed["changed"]["learner.expert_parallel"] == [8, 2]


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight"],
)
def test_a_wrong_tensor_of_an_export_is_noticed(rehearsed, tmp_path, name):
    """By transformers' log-probs, if the halves of a tensor are exchanged as by a wrong order of shards."""
    run, small = Path(rehearsed["folder"]) / "run", load(Path(rehearsed["folder"]) / "recipe.yaml")
    samples = json.loads((run / "samples" / "after.json").read_text())
    shutil.copytree(run / "export", tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    weights = load_file(file)
    weights[name].copy_(weights[name].roll(len(weights[name]) // 2, 0))
    save_file(weights, file, metadata={"format": "pt"})
    models = (tmp_path / "export", model_folder(small.model))
    with pytest.raises(checks.Failed, match=r"transformers' log-probs differ from the servers'"):
        checks.parity(samples, *models, 1.0, checks.limit_of(small))


def test_a_run_that_did_not_go_on_where_it_stood_is_noticed(rehearsed, tmp_path):
    folder, run = Path(rehearsed["folder"]), tmp_path / "run"
    shutil.copytree(folder / "run" / "checkpoints", run / "checkpoints", symlinks=True)
    recipe, rows = load(folder / "recipe.yaml"), rows_of(folder / "run")
    for wrong, message in (
        ([*rows, rows[-1]], "line 4, is step 2 after step 2"),
        (rows[:-1], r"has the steps \[0, 1\], not 0 to 2"),
        ([*rows[:-1], {**rows[-1], "updates": 99}], "updates of .* the checkpoint has"),
        ([*rows[:-1], {**rows[-1], "updates": 0}], "skipped for an overflow, so it shows nothing"),
        ([*rows[:-1], {**rows[-1], "lr": 1.0}], "the optimizer did not go on where it stood"),
    ):
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
        with pytest.raises(checks.Failed, match=message):
            resumed(run, 2, recipe)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Adam moments follow" in resumed(run, 2, recipe)
    forget_the_scaler(run / "checkpoints" / "step_3")
    with pytest.raises(checks.Failed, match=r"the loss scale after the resumed step is .*, not "):
        resumed(run, 2, recipe)


def forget_the_scaler(checkpoint):
    """Writes a checkpoint's state again, whole by its manifest, with a fresh scaler."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["scaler"]["growth_tracker"] = 1
    (checkpoint / "state.json").write_text(json.dumps(state))
    files = [f for f in checkpoint.rglob("*") if f.is_file() and f.name != "manifest.json"]
    names = {str(f.relative_to(checkpoint)): checkpoint_files.digest(f) for f in files}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 3, "files": names}))


def test_steps_without_sync_servers_or_agreement_are_noticed(rehearsed):
    rows = rows_of(Path(rehearsed["folder"]) / "run")
    limit = checks.limit_of(load(Path(rehearsed["folder"]) / "recipe.yaml"))
    assert "3 syncs verified" in checks.steps(rows, 1, limit)
    key = "sync/verified_logprob_abs_mean"
    for change, message in (
        ({key: None}, "step 1 .* those of the servers were not verified"),
        ({key: 0.0}, "step 1 .* those of the servers were not verified"),
        ({"sync/version": 1}, "servers have version 1, not 2"),
        ({"mismatch/logprob_abs_mean": 0.5}, "differ by 0.5 nats on average in the samples"),
        ({"rollout/servers": 0}, r"steps \[1\] did not sample from all 1 servers"),
    ):
        with pytest.raises(checks.Failed, match=message):
            checks.steps([rows[0], {**rows[1], **change}, rows[2]], 1, limit)
    with pytest.raises(checks.Failed, match="no step had a gradient"):
        checks.steps([{**rows[1], "updates": 0}], 1, limit)


def test_a_process_that_has_lost_its_parent_is_noticed(tmp_path):
    """What a kill leaves behind is known by its environment, not by its parent."""
    environment = {**os.environ, "TMPDIR": str(tmp_path / "of-a-server")}
    done = subprocess.run(
        ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    try:
        assert [process.pid for process in started_with(str(tmp_path))] == [int(done.stdout)]
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_a_failure_is_named_with_its_log(tmp_path, monkeypatch):
    """Of an installation that is broken."""
    (tmp_path / "torch.py").write_text('raise ImportError("libcudart.so.13: not found")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    root = tmp_path / "root"
    done = fp16rl("rehearse", DENSE, "--root", root, "--json", code=1)
    result = json.loads(done.stdout)
    assert not result["ok"]
    assert "libcudart.so.13: not found" in result["reason"]
    assert f"{result['folder']}/start.log" in done.stderr


def test_what_no_cluster_could_run_is_refused_as_a_bad_recipe():
    """Three stages of 40 layers; a model of which there is neither a folder nor a shape."""
    for override, message in (
        ("learner.pipeline_parallel=3", "pipeline_parallel"),
        ("model.shape=null", "there is no Hugging Face folder"),
    ):
        wrong = fp16rl("rehearse", DENSE, "--set", override, code=2)
        assert message in wrong.stderr
