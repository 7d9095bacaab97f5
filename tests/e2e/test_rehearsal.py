"""Rehearsals, run: what they say is so, and what is wrong is found."""

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


def write_recipe(folder, name, learner, rollout):
    """A recipe file of a large model, and its shape beside it."""
    (folder / "shape.json").write_text(json.dumps(SHAPES[name]))
    full = recipe(learner, rollout, model={"path": "owner/large", "shape": "shape.json"})
    (folder / "large.yaml").write_text(full.to_yaml())
    return folder / "large.yaml"


def rehearse(path, root, *options, check=True):
    command = ["-m", "megatron_fp16rl.cli", "rehearse", path, "--root", root, "--json", *options]
    return python(*command, timeout=900, check=check)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """What the rehearsal of a recipe of the catalogue says: the paper's Qwen3-14B, DAPO, TP 4."""
    root, path = (
        tmp_path_factory.mktemp("dense"),
        ROOT / "recipes/dense/qwen3-14b-dapo-fp16-4n8g.yaml",
    )
    fewer = ["--ranks", 2, "--set", "rollout.tensor_parallel=1"]  # processes than it would have
    return json.loads(rehearse(path, root, *fewer).stdout)


def assert_proved(result, ranks, tensors):
    """A rehearsal that went well, by what its run left on disk and not by what it says of itself."""
    assert (result["ok"], result["reason"], result["ranks"]) == (True, None, ranks)
    run = Path(result["folder"]) / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
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
    said = {row["what"]: row["figure"] for row in result["proved"]}
    assert "processes are gone" in said["kill"]
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["proved"]


def test_a_dense_recipe_is_rehearsed(dense):
    assert_proved(dense, ranks=2, tensors=25)
    assert {"what": "tensor_parallel", "full": 4, "here": 2} in dense["folded"]


def test_a_recipe_of_experts_is_rehearsed(tmp_path):
    """Of the catalogue: Qwen3-30B-A3B, token TIS, router replay; without its second pipeline stage."""
    path = ROOT / "recipes/moe/qwen3-30b-a3b-token-tis-fp16-4n8g.yaml"
    fewer = ["--ranks", 2, "--set", "learner.pipeline_parallel=1", "--set", "rollout.servers=1"]
    result = json.loads(rehearse(path, tmp_path, *fewer).stdout)
    assert_proved(result, ranks=2, tensors=69)
    small = load(Path(result["folder"]) / "recipe.yaml")
    assert (small.learner.expert_parallel, small.rollout.tensor_parallel) == (2, 2)
    folder, name = Path(result["folder"]), "model.layers.0.mlp.experts.5.down_proj.weight"
    wrong = damaged(folder / "run", tmp_path / "wrong", name, lambda t: t.copy_(t.roll(32, 0)))
    allowed = checks.Tolerance.of(small, {"num_experts": 8})
    with pytest.raises(checks.Failed, match=r"transformers' log-probs differ from the servers'"):
        checks.parity(wrong, folder / "model", 1.0, allowed, 3)


def damaged(run, copy, name, change):
    """A copy of a run's export and samples, with one tensor of the export changed."""
    shutil.copytree(run / "export", copy / "export")
    shutil.copytree(run / "samples", copy / "samples")
    file = copy / "export" / "model.safetensors"
    weights = load_file(file)
    change(weights[name])
    save_file(weights, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_wrong_tensor_of_an_export_is_found(dense, tmp_path, name):
    """By transformers' log-probs if its halves are exchanged, as by a wrong order of shards."""
    folder = Path(dense["folder"])
    allowed = checks.Tolerance.of(load(folder / "recipe.yaml"), {})
    wrong = damaged(folder / "run", tmp_path, name, lambda t: t.copy_(t.roll(len(t) // 2, 0)))
    with pytest.raises(checks.Failed, match=r"transformers' log-probs differ from the servers'"):
        checks.parity(wrong, folder / "model", 1.0, allowed, 3)


def test_a_single_wrong_number_of_an_export_is_found(dense, tmp_path):
    """By the last checkpoint."""
    folder, name = Path(dense["folder"]), "model.layers.1.mlp.gate_proj.weight"
    wrong = damaged(folder / "run", tmp_path, name, lambda t: t[3, 5].add_(0.001))
    with pytest.raises(checks.Failed, match=rf"{name} is not what the last checkpoint holds"):
        checks.export(wrong / "export", folder / "model", folder / "converted", "fp16")
    (folder / "lacking").mkdir()
    weights = load_file(folder / "run" / "export" / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "lacking" / "model.safetensors")
    with pytest.raises(checks.Failed, match=rf"names differ .*{name}"):
        checks.export(folder / "lacking", folder / "model", folder / "converted", "fp16")
    with pytest.raises(checks.Failed, match=r"is torch.float16, the recipe's precision is bf16"):
        checks.export(folder / "run/export", folder / "model", folder / "converted", "bf16")


@pytest.fixture
def run(dense, tmp_path):
    """A copy of a rehearsed run to doctor: metrics and checkpoints. And its recipe."""
    folder = Path(dense["folder"])
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "rollouts"):
        shutil.copytree(folder / "run" / name, tmp_path / "run" / name, symlinks=True)
    shutil.copy(folder / "run" / "metrics.jsonl", tmp_path / "run")
    return tmp_path / "run", load(folder / "recipe.yaml")


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_rows(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def doctor(run, step, change_state=lambda state: None, change_tensors=None):
    """Writes a checkpoint again, whole by its manifest, with other state or tensors."""
    found = checkpoint_files.Checkpoint(run / "checkpoints" / f"step_{step}")
    state = json.loads((found.path / "state.json").read_text())
    change_state(state)
    (found.path / "state.json").write_text(json.dumps(state))
    if change_tensors:
        tensors = read_tensors(found)
        change_tensors(tensors)
        for file in (*found.path.glob("*.distcp"), found.path / ".metadata"):
            file.unlink()
        writer = torch.distributed.checkpoint.FileSystemWriter(found.path)
        torch.distributed.checkpoint.save(tensors, storage_writer=writer, no_dist=True)
    files = [f for f in found.path.rglob("*") if f.is_file() and f.name != "manifest.json"]
    names = {str(f.relative_to(found.path)): checkpoint_files.digest(f) for f in files}
    (found.path / "manifest.json").write_text(json.dumps({"step": step, "files": names}))
    assert not found.faults(names)


def assert_fails(run, recipe, message):
    with pytest.raises(checks.Failed, match=message):
        resumed(run, 2, recipe)


def test_a_run_that_did_not_go_on_where_it_stood_is_found(run):
    run, recipe = run
    assert "moments are what one update makes" in resumed(run, 2, recipe), "what is true passes"
    rows = rows_of(run)
    write_rows(run, [*rows, rows[-1]])
    assert_fails(run, recipe, r"has the steps \[0, 1, 2, 2\], not 0 to 2")
    write_rows(run, [*rows[:-1], {**rows[-1], "updates": 99}])
    assert_fails(run, recipe, r"3 steps made 101 updates; their checkpoint counts .*3")
    write_rows(run, [*rows[:-1], {**rows[-1], "tokens/step": 1}])
    assert_fails(run, recipe, r"3 steps had \d+ tokens, not \d+")
    other = 0.5 if rows[-1]["grad/norm"] > 0.75 else 1.0
    write_rows(run, [*rows[:-1], {**rows[-1], "grad/norm": other}])
    assert_fails(run, recipe, rf"a gradient of norm .*; the resumed step's was {other:g} when")


@pytest.mark.parametrize(
    ("step", "scaler"),
    [
        (3, {"growth_tracker": 1}),  # as of a fresh one after an update
        (2, {"scale": 2.0**14, "growth_tracker": 1, "skipped_total": 1}),  # a halving was lost
        (3, {"scale": 2.0**16}),
        (3, {"hysteresis_left": 0}),
    ],
)
def test_a_lost_loss_scale_is_found(run, step, scaler):
    run, recipe = run
    doctor(run, step, lambda state: state["scaler"].update(scaler))
    assert_fails(run, recipe, "the loss scale did not go on where it stood")


def test_a_loss_scale_that_went_wrong_before_the_checkpoint_is_found(run):
    run, recipe = run
    for step in (2, 3):
        doctor(run, step, lambda state: state["scaler"].update(scale=2.0**13))
    assert_fails(run, recipe, r"the loss scale before the checkpoint, 8192 .* makes of 32768")


def step_again(dense, run, recipe, lost):
    """The resumed step of one tensor again, by torch's Adam, without what is lost: that is zero, or
    of the weights what was imported."""
    name, settings = "output_layer.weight", recipe.learner.optimizer
    old = read_tensors(checkpoint_files.Checkpoint(run / "checkpoints" / "step_2"))
    imported = load_file(Path(dense["folder"]) / "model" / "model.safetensors")["lm_head.weight"]
    keys = {n: f"optimizer.state.{n}.{name}" for n in ("fp32_param", "exp_avg", "exp_avg_sq")}
    began = {n: old[key].clone() for n, key in keys.items()}
    for what in lost:
        fresh = imported.half().float() if what == "fp32_param" else torch.zeros_like(began[what])
        began[what] = fresh

    def change(new):
        moved = new[keys["exp_avg"]] - settings.beta1 * old[keys["exp_avg"]]
        weight = torch.nn.Parameter(began.pop("fp32_param"))
        weight.grad = moved / (1 - settings.beta1)
        adam = torch.optim.AdamW(
            *([weight], settings.lr, (settings.beta1, settings.beta2), settings.eps),
            weight_decay=settings.weight_decay,
        )
        adam.state[weight] = {**began, "step": torch.tensor(2.0)}
        adam.step()
        new |= {name: weight.data.half(), keys["fp32_param"]: weight.data}
        new |= {keys[n]: adam.state[weight][n] for n in ("exp_avg", "exp_avg_sq")}

    doctor(run, 3, change_tensors=change)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (("exp_avg", "exp_avg_sq"), "of exp_avg and exp_avg_sq do not follow"),
        (("exp_avg",), "of exp_avg and exp_avg_sq do not follow"),
        (("exp_avg_sq",), "of exp_avg and exp_avg_sq do not follow"),
        (("fp32_param",), "of the weights are not where 1 update"),
    ],
)
def test_a_resume_without_the_optimizers_state_is_found(dense, run, lost, message):
    run, recipe = run
    step_again(dense, run, recipe, lost=())
    assert resumed(run, 2, recipe), "with all of it, torch's step is Megatron's"
    step_again(dense, run, recipe, lost)
    assert_fails(run, recipe, rf"did not go on where it stood: output_layer.weight: .* {message}")


def test_weights_that_are_not_the_optimizers_are_found(run):
    run, recipe = run
    doctor(run, 3, change_tensors=lambda tensors: tensors["output_layer.weight"][3, 5].add_(0.01))
    assert_fails(run, recipe, r"output_layer.weight is not the optimizer's fp32_param, rounded")


def test_a_resumed_step_that_skipped_everything_proves_nothing(run):
    run, recipe = run
    rows = rows_of(run)
    write_rows(run, [*rows[:-1], {**rows[-1], "updates": 0, "lr": None, "grad/norm": None}])
    shutil.rmtree(run / "checkpoints" / "step_3")
    shutil.copytree(run / "checkpoints" / "step_2", run / "checkpoints" / "step_3")

    def skip(state):
        state["scaler"] |= {"scale": 2.0**14, "growth_tracker": 0, "hysteresis_left": 0}
        state["scaler"] |= {"skipped_total": 1, "skipped_in_a_row": 1}
        state["progress"] |= {"step": 3, "tokens": rows[-1]["tokens/total"]}

    doctor(run, 3, skip)
    assert_fails(run, recipe, "not proved that the run went on: every update .* was skipped")


def test_a_resumed_step_that_sampled_from_other_weights_is_found(dense, run):
    """Of the import, of the step's own end; or from weights that say that they are others."""
    (run, recipe), folder = run, Path(dense["folder"])
    known = (folder / "model", 1.0, checks.Tolerance.of(recipe, {}))
    assert checks.resampled(run, 2, folder / "before", *known).mean < 3e-3
    for wrong in ("model", "converted"):
        with pytest.raises(checks.Failed, match=r"log-probs differ from the servers'"):
            checks.resampled(run, 2, folder / wrong, *known)
    doctor(run, 2, lambda state: state["progress"].update(version=1))
    with pytest.raises(checks.Failed, match=r"weights of version \[2\], not 1"):
        checks.resampled(run, 2, folder / "before", *known)


def test_a_sync_that_was_not_verified_is_found(run):
    run, recipe = run
    rows, allowed = rows_of(run), checks.Tolerance.of(recipe, {})
    assert checks.sync(rows, allowed).startswith("3 of 3 steps")
    key = "sync/verified_logprob_abs_mean"
    for wrong, message in (
        ({k: v for k, v in rows[1].items() if k != key}, "step 1 .* no server's were verified"),
        ({**rows[1], key: 0.0}, "step 1 .* no server's were verified"),
        ({**rows[1], "sync/version": 1}, "servers have version 1, not 2"),
        ({**rows[1], key: 0.1}, "differ from the learner's by 0.1 nats"),
    ):
        with pytest.raises(checks.Failed, match=message):
            checks.sync([rows[0], wrong, rows[2]], allowed)
    skipped = {k: v for k, v in rows[1].items() if k != key} | {"updates": 0, "sync/version": 1}
    assert checks.sync([rows[0], skipped, rows[2]], allowed).startswith("2 of 3 steps")
    with pytest.raises(checks.Failed, match="no sync to verify"):
        checks.sync([skipped], allowed)


def test_samples_of_fewer_servers_or_other_weights_are_found(run):
    run, recipe = run
    rows, allowed = rows_of(run), checks.Tolerance.of(recipe, {})
    assert checks.sampled(rows, 2, allowed)
    with pytest.raises(checks.Failed, match=r"steps \[1\] sampled from other than 2 servers"):
        checks.sampled([rows[0], {**rows[1], "rollout/servers": 1}], 2, allowed)
    with pytest.raises(checks.Failed, match=r"samples' log-probs differ .* by 0.5 nats"):
        checks.sampled([rows[0], {**rows[1], "mismatch/logprob_abs_mean": 0.5}], 2, allowed)


def test_a_gate_on_a_metric_that_is_not_there_is_found(run):
    run, recipe = run
    rows = rows_of(run)
    assert [gate.metric for gate in recipe.gates] == ["mismatch/kl_k3", "fp16/skipped_total"]
    assert checks.gates(rows, recipe.gates).startswith("2 of 2")
    for name in ("mismatch/kl_k4", "fp16/overflow_source"):  # of which the second is no number
        wrong = recipe.gates[0].model_copy(update={"metric": name})
        with pytest.raises(checks.Failed, match=f"gates: {name} had no number in 3 steps"):
            checks.gates(rows, [wrong])


def test_a_process_that_has_lost_its_parent_is_found(tmp_path):
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


def test_what_fails_is_named_with_its_log(tmp_path):
    """An option that Megatron does not have."""
    path = write_recipe(tmp_path, "qwen3-tied", {"megatron": {"no_such_option": 1}}, {})
    done = rehearse(path, tmp_path, "--ranks", 1, check=False)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert not result["ok"]
    assert "no_such_option" in result["reason"]
    assert f"{result['folder']}/start.log" in done.stderr


def test_what_no_cluster_could_run_is_refused_as_a_bad_recipe(tmp_path):
    """Five stages of 36 layers; a model of which there is neither a folder nor a shape."""
    path = write_recipe(tmp_path, "qwen3-tied", {}, {})
    layout = ["--set", "learner.ranks=5", "--set", "learner.pipeline_parallel=5"]
    wrong = CliRunner().invoke(app, ["rehearse", str(path), *layout])
    assert wrong.exit_code == 2
    assert "pipeline_parallel x model_chunks=5 does not divide" in wrong.stderr
    nowhere = CliRunner().invoke(app, ["rehearse", str(path), "--set", "model.shape=null"])
    assert nowhere.exit_code == 2
    assert "owner/large" in nowhere.stderr
