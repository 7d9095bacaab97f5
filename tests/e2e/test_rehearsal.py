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
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools.rehearse import checks
from megatron_fp16rl.tools.rehearse.resume import read_tensors, resumed
from megatron_fp16rl.tools.rehearse.run import started_with
from tests.conftest import ROOT, python
from tests.unit.test_rehearsal_shrink import SHAPES, recipe


def write_recipe(folder, learner):
    """A recipe file of a large model, and its shape beside it."""
    (folder / "shape.json").write_text(json.dumps(SHAPES["qwen3-tied"]))
    full = recipe(learner, model={"path": "owner/large", "shape": "shape.json"})
    (folder / "large.yaml").write_text(full.to_yaml())
    return folder / "large.yaml"


def rehearse(path, root, *options, check=True):
    command = ["-m", "megatron_fp16rl.cli", "rehearse", path, "--root", root, "--json", *options]
    return python(*command, timeout=900, check=check)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The result for a recipe that ships: the paper's Qwen3-14B, DAPO, TP 4; with fewer processes."""
    path = ROOT / "recipes/dense/qwen3-14b-dapo-fp16-4n8g.yaml"
    fewer = ["--ranks", 2, "--set", "rollout.tensor_parallel=1"]
    return json.loads(rehearse(path, tmp_path_factory.mktemp("dense"), *fewer).stdout)


def assert_proved(result, ranks, tensors):
    """A rehearsal that went well, by what its run left on disk and not by what it says of itself."""
    assert (result["ok"], result["reason"], result["ranks"]) == (True, None, ranks)
    run = Path(result["folder"]) / "run"
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    state = json.loads((run / "checkpoints" / "step_3" / "state.json").read_text())
    assert state["progress"]["step"] == 3
    assert state["schedule"]["updates"] == sum(row["updates"] for row in rows) >= 3
    assert state["layout"]["ranks"] == ranks
    attempts = sorted(path.name for path in (run / "logs").iterdir())
    assert attempts == ["attempt_0", "attempt_1"], "killed once, resumed once"
    weights = load_file(run / "export" / "model.safetensors")
    assert len(weights) == tensors
    assert {tensor.dtype for tensor in weights.values()} <= {torch.float16, torch.float32}
    figures = {row["what"]: row["figure"] for row in result["proved"]}
    assert "processes are gone" in figures["kill"]
    assert "Adam moments follow" in figures["resume, one more step"]
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["proved"]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_dense_recipe_is_rehearsed(dense):
    assert_proved(dense, ranks=2, tensors=25)
    assert {"what": "learner.tensor_parallel", "full": 4, "here": 2} in dense["folded"]


def test_a_recipe_of_experts_is_rehearsed(tmp_path):
    """Qwen3-30B-A3B, token TIS, router replay, eight updates a step; without its second stage."""
    path = ROOT / "recipes/moe/qwen3-30b-a3b-token-tis-fp16-4n8g.yaml"
    fewer = ["--ranks", 2, "--set", "learner.pipeline_parallel=1", "--set", "rollout.servers=1"]
    result = json.loads(rehearse(path, tmp_path, *fewer).stdout)
    assert_proved(result, ranks=2, tensors=69)
    small = load(Path(result["folder"]) / "recipe.yaml")
    assert (small.learner.expert_parallel, small.rollout.tensor_parallel) == (2, 2)
    assert_noticed(result, tmp_path, "model.layers.0.mlp.experts.5.down_proj.weight")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_wrong_tensor_of_an_export_is_noticed(dense, tmp_path, name):
    assert_noticed(dense, tmp_path, name)


def assert_noticed(result, folder, name):
    """By transformers' log-probs, if the halves of a tensor are exchanged as by a wrong order of shards."""
    run, small = Path(result["folder"]) / "run", load(Path(result["folder"]) / "recipe.yaml")
    samples = json.loads((run / "samples" / "after.json").read_text())
    shutil.copytree(run / "export", folder / "export")
    file = folder / "export" / "model.safetensors"
    weights = load_file(file)
    weights[name].copy_(weights[name].roll(len(weights[name]) // 2, 0))
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((run / "export" / "config.json").read_text())
    tolerance = checks.Tolerance.of(small, config)
    arguments = (samples, folder / "export", run.parent / "model", 1.0, tolerance)
    with pytest.raises(checks.Failed, match=r"transformers' log-probs differ from the servers'"):
        checks.parity(*arguments)
    with pytest.raises(checks.Failed, match=r"is torch.float16, the recipe's precision is bf16"):
        checks.export(folder / "export", "bf16")


@pytest.fixture
def run(dense, tmp_path):
    """A copy of a rehearsed run whose metrics and checkpoints may be changed, and its recipe."""
    folder = Path(dense["folder"])
    shutil.copytree(folder / "run" / "checkpoints", tmp_path / "run" / "checkpoints", symlinks=True)
    shutil.copy(folder / "run" / "metrics.jsonl", tmp_path / "run")
    return tmp_path / "run", load(folder / "recipe.yaml")


def write_rows(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rewrite(run, change_state=lambda state: None, change_tensors=None):
    """Writes the resumed step's checkpoint again, whole by its manifest, with other state or tensors."""
    checkpoint = checkpoint_files.Checkpoint(run / "checkpoints" / "step_3")
    state = json.loads((checkpoint.path / "state.json").read_text())
    change_state(state)
    (checkpoint.path / "state.json").write_text(json.dumps(state))
    if change_tensors:
        tensors = read_tensors(checkpoint)
        change_tensors(tensors)
        for file in (*checkpoint.path.glob("*.distcp"), checkpoint.path / ".metadata"):
            file.unlink()
        writer = torch.distributed.checkpoint.FileSystemWriter(checkpoint.path)
        torch.distributed.checkpoint.save(tensors, storage_writer=writer, no_dist=True)
    files = [f for f in checkpoint.path.rglob("*") if f.is_file() and f.name != "manifest.json"]
    names = {str(f.relative_to(checkpoint.path)): checkpoint_files.digest(f) for f in files}
    (checkpoint.path / "manifest.json").write_text(json.dumps({"step": 3, "files": names}))


def assert_fails(run, recipe, message):
    with pytest.raises(checks.Failed, match=message):
        resumed(run, 2, recipe)


def test_a_run_that_did_not_go_on_where_it_stood_is_noticed(run):
    run, recipe = run
    assert "Adam moments follow" in resumed(run, 2, recipe)
    rows = rows_of(run)
    for wrong, message in (
        ([*rows, rows[-1]], r"has the steps \[0, 1, 2, 2\], not 0 to 2"),
        ([*rows[:-1], {**rows[-1], "updates": 99}], "3 steps made 101 updates; the checkpoint has"),
        ([*rows[:-1], {**rows[-1], "updates": 0}], "skipped for an overflow, so it shows nothing"),
        ([*rows[:-1], {**rows[-1], "tokens/step": 1}], r"3 steps had \d+ tokens, not \d+"),
    ):
        write_rows(run, wrong)
        assert_fails(run, recipe, message)
    write_rows(run, rows)
    rewrite(run, lambda state: state["scaler"].update(growth_tracker=1))  # as of a fresh scaler
    assert_fails(run, recipe, "the loss scale after the resumed step is .*, not ")


NAME = "output_layer.weight"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (("exp_avg", "exp_avg_sq"), "stood: exp_avg and exp_avg_sq of output_layer.weight"),
        (("fp32_param",), "stood: the weights of output_layer.weight"),
        ((), None),
    ],
)
def test_a_resume_without_the_optimizers_state_is_noticed(dense, run, lost, message):
    """The resumed step of one tensor is taken again by torch's Adam, without what is lost."""
    run, recipe = run
    settings = recipe.learner.optimizer
    old = read_tensors(checkpoint_files.Checkpoint(run / "checkpoints" / "step_2"))
    keys = {
        part: f"optimizer.state.{part}.{NAME}" for part in ("fp32_param", "exp_avg", "exp_avg_sq")
    }
    start = {part: old[key].clone() for part, key in keys.items()}
    imported = load_file(Path(dense["folder"]) / "model" / "model.safetensors")["lm_head.weight"]
    for part in lost:
        start[part] = imported.half().float() if part == "fp32_param" else start[part] * 0

    def change(new):
        momentum = new[keys["exp_avg"]] - settings.beta1 * old[keys["exp_avg"]]
        weight = torch.nn.Parameter(start.pop("fp32_param"))
        weight.grad = momentum / (1 - settings.beta1)
        betas = (settings.beta1, settings.beta2)
        decay = settings.weight_decay
        adam = torch.optim.AdamW([weight], settings.lr, betas, settings.eps, weight_decay=decay)
        adam.state[weight] = {**start, "step": torch.tensor(2.0)}
        adam.step()
        new |= {NAME: weight.data.half(), keys["fp32_param"]: weight.data}
        new |= {keys[part]: adam.state[weight][part] for part in ("exp_avg", "exp_avg_sq")}

    rewrite(run, change_tensors=change)
    if message is None:
        assert resumed(run, 2, recipe), "with all of it, torch's step is Megatron's"
    else:
        assert_fails(run, recipe, message)


def test_weights_that_are_not_the_optimizers_are_noticed(run):
    run, recipe = run
    rewrite(run, change_tensors=lambda tensors: tensors[NAME][3, 5].add_(0.01))
    assert_fails(run, recipe, f"{NAME} is not the optimizer's fp32 weight, rounded")


def test_steps_without_sync_servers_or_agreement_are_noticed(run):
    run, recipe = run
    rows, tolerance = rows_of(run), checks.Tolerance.of(recipe, {})
    assert "3 syncs verified" in checks.steps(rows, 2, tolerance)
    key = "sync/verified_logprob_abs_mean"
    for change, message in (
        ({key: None}, "step 1 .* those of the servers were not verified"),
        ({key: 0.0}, "step 1 .* those of the servers were not verified"),
        ({"sync/version": 1}, "servers have version 1, not 2"),
        ({key: 0.1}, "0.1 after a sync; rounding explains"),
        ({"mismatch/logprob_abs_mean": 0.5}, "differ by 0.5 nats on average in the samples"),
        ({"rollout/servers": 1}, r"steps \[1\] did not sample from all 2 servers"),
    ):
        with pytest.raises(checks.Failed, match=message):
            checks.steps([rows[0], {**rows[1], **change}, rows[2]], 2, tolerance)
    skipped = {**rows[1], key: None, "updates": 0, "sync/version": 1}
    assert "2 syncs verified" in checks.steps([rows[0], skipped, rows[2]], 2, tolerance)
    with pytest.raises(checks.Failed, match="no step had a gradient"):
        checks.steps([skipped], 2, tolerance)


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


def test_a_failure_is_named_with_its_log(tmp_path):
    """An option that Megatron does not have."""
    path = write_recipe(tmp_path, {"megatron": {"no_such_option": 1}})
    done = rehearse(path, tmp_path, "--ranks", 1, check=False)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert not result["ok"]
    assert "no_such_option" in result["reason"]
    assert f"{result['folder']}/start.log" in done.stderr


def test_what_no_cluster_could_run_is_refused_as_a_bad_recipe(tmp_path):
    """Five stages of 36 layers; a model of which there is neither a folder nor a shape."""
    path = write_recipe(tmp_path, {})
    layout = ["--set", "learner.ranks=5", "--set", "learner.pipeline_parallel=5"]
    wrong = CliRunner().invoke(app, ["rehearse", str(path), *layout])
    assert wrong.exit_code == 2
    assert "pipeline_parallel x model_chunks=5 does not divide" in wrong.stderr
    nowhere = CliRunner().invoke(app, ["rehearse", str(path), "--set", "model.shape=null"])
    assert nowhere.exit_code == 2
    assert "owner/large" in nowhere.stderr
