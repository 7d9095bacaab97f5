"""The main job with real engines: three steps, everything it leaves behind, and the same again."""

import json
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch

from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import load
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from tests.conftest import ROOT, python, run_ranks
from tests.runs import fp16rl, go_on, learnt, make_run, steps_of

RECIPE = "recipes/tiny/dense-grpo-fp16.yaml"
KEYS = """step reward/mean reward/without_signal_fraction batch/samples batch/prompts_digest loss/policy
    grad/norm lr response/length_mean response/truncated_fraction fp16/loss_scale fp16/skipped_total
    fp16/overflow_source mismatch/logprob_abs_mean mismatch/kl_k1 mismatch/kl_k3
    mismatch/seq_log_ratio_mean mismatch/seq_log_ratio_std mismatch/ess mismatch/chi2_seq
    time/step_s time/rollout_s time/score_s time/update_s time/sync_s sync/bytes sync/version
    tokens/total"""
# In 80 updates, not 180.
WARM_START = """{accuracy: 0.12, noise: 0.0, check_every: 20, optimizer: {lr: 3.0e-3, warmup_updates: 20,
    weight_decay: 0.01}}"""
SMALL = ["rollout.prompts=16", "rollout.samples=8", "learner.global_batch_size=32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped recipe, three steps of a quarter of its samples after a shorter warm start.

    What it printed, and its directory.
    """
    root = tmp_path_factory.mktemp("runs")
    settings = [f"trainer.run_root={root}", "trainer.steps=3", "sync.verify=always", *SMALL]
    settings += ["rollout.record=true", "rollout.deterministic=true", "checkpoint.every=2"]
    settings += ["trainer.suites=[{suite: 'training:pass@2', problems: 64}]"]
    settings += ["rollout.refill_rounds=1", f"warm_start={WARM_START}"]
    command = ["-m", "megatron_fp16rl.cli", "train", RECIPE, "--check"]
    command += [f"--set={setting}" for setting in settings]
    done = python(*command, timeout=400, check=False)
    assert done.returncode == 1, "three steps do not make the recipe's mark"
    return done.stdout, root / "tiny-dense-grpo-fp16"


def replayed(run):
    """Settings of a run that learns from its samples, and needs no server."""
    replay = [f"rollout.replay={run[1]}/rollouts", "warm_start=null", "trainer.steps=3"]
    return [*SMALL, *replay]


def test_every_step_is_recorded(run):
    _, folder = run
    recorded = steps_of(folder)
    assert [row["step"] for row in recorded] == [0, 1, 2]
    for row in recorded:
        assert set(KEYS.split()) <= set(row)
        assert row["sync/version"] == row["step"] + 1
        assert row["fp16/loss_scale"] == 2**15
        assert 0 < row["mismatch/logprob_abs_mean"] < 5e-3
        assert row["updates"] == 4
        assert 0 <= row["reward/mean"] <= 1
        parts = sum(row[f"time/{part}_s"] for part in ("rollout", "score", "update", "sync"))
        assert parts <= row["time/step_s"]
        # fp16 tolerance: what the engines differ by on the same weights. Wrong weights: over 0.01.
        assert row["sync/verified_logprob_abs_mean"] < 3e-3
        assert row["sync/bytes"] > 700_000  # 0.4M parameters in fp16
    assert recorded[-1]["tokens/total"] > 3 * 128 * 9
    assert sum(row["rollout/refilled_prompts"] for row in recorded) >= 1
    assert "eval/accuracy" in recorded[-1]
    assert 0 < recorded[-1]["eval/training/pass@2"] < 1


def test_the_last_lines_say_what_was_reached(run):
    output, folder = run
    summary = json.loads((folder / "summary.json").read_text())
    tail = "\n".join(output.strip().splitlines()[-7:])
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert f"held-out accuracy: {before:.3f} -> {after:.3f}" in tail
    assert re.search(
        r"wall time: \d+ s for 3 steps \(rollout \d+ %, score \d+ %, update \d+ %, sync \d+ %\)",
        tail,
    )
    assert f"mean |log pi - log mu|: {summary['mismatch_logprob_abs_mean']:.1e}" in tail
    assert "skipped updates: 0" in tail
    assert summary["gates_broken"] == [f"gate: eval/accuracy is {after:.4g}, below 0.85"]
    assert summary["gates_broken"][0] in tail
    assert f"report: {folder}/report.html" in tail
    assert 0.05 < before < 0.35, "the warm start aims at 0.12"
    assert summary["steps"] == 3
    assert set(summary["shares"]) == {"rollout", "score", "update", "sync"}
    assert 0.5 < sum(summary["shares"].values()) <= 1


def test_the_run_directory_is_complete_and_private_where_it_must_be(run):
    _, folder = run
    assert load(folder / "recipe.yaml").trainer.steps == 3
    assert list((folder / "tensorboard").glob("events.*"))
    assert {p.name for p in (folder / "logs" / "attempt_0").iterdir()} == {
        "server_0.log",
        "rank_0.log",
        "rank_1.log",
        "recipe.yaml",
    }
    assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o700
    for file in filter(Path.is_file, (folder / "private").rglob("*")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secrets = [
        json.loads(file.read_text())[key]
        for file in (folder / "private").glob("server-*.json")
        for key in ("api", "admin")
    ]
    assert secrets
    for log in (folder / "logs" / "attempt_0").iterdir():
        assert not any(secret in log.read_text(errors="replace") for secret in secrets)


def test_the_report_needs_nothing_else(run):
    _, folder = run
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    for text in ("Reward", "FP16 loss scale", "Training-inference mismatch", "Seconds a step"):
        assert text in page, text
    samples = json.loads((folder / "samples" / "after.json").read_text())
    assert len(samples) == 16
    assert all(sample["prompt"]["text"] in page for sample in samples)


def test_the_export_is_a_hugging_face_model_of_the_same_accuracy(run):
    """Sampled accuracy by transformers alone, as an expectation: the right answers' probability."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_fp16rl.data.tasks import make

    _, folder = run
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert model.dtype is torch.float16
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    recipe = load(ROOT / RECIPE)
    prompts = make(recipe.task, tokenizer, 0).held_out_prompts(recipe.trainer.eval_prompts)
    answers = [[*tokenizer.encode(p.answer), tokenizer.eos_token_id] for p in prompts]
    tokens = torch.tensor([p.ids + a for p, a in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        logprobs = model.float()(tokens).logits.log_softmax(-1)
    start = len(prompts[0].ids)
    chosen = logprobs[:, start - 1 : -1].gather(2, tokens[:, start:, None])[..., 0]
    expected = chosen.sum(1).exp().mean().item()
    measured = steps_of(folder)[-1]["eval/accuracy"]
    # The measured accuracy is a sample of 512: a standard deviation of at most 0.022.
    assert measured == pytest.approx(expected, abs=0.08)


def test_a_run_is_evaluated(run, tmp_path):
    """fp16rl eval on its export: the accuracy of the run's own last evaluation, within chance."""
    _, folder = run
    command = ["eval", folder, "--out", tmp_path, "--json"]
    command += ["--suite=held-out:avg@2", "--suite=held-out:pass@4", "--suite=held-out:greedy"]
    kept = tmp_path / "perfectible.jsonl"
    command += ["--perfectible", kept, "--problems=200"]
    first = json.loads(fp16rl(*command).stdout)
    average, passes, greedy = first["rows"]
    assert average["value"] == pytest.approx(steps_of(folder)[-1]["eval/accuracy"], abs=0.12)
    assert average["low"] < average["value"] < average["high"]
    assert average["value"] < passes["value"]
    assert (average["responses"], greedy["responses"], greedy["k"]) == (800, 200, 1)
    problems = [json.loads(line) for line in kept.read_text().splitlines()]
    assert first["perfectible"]["problems"] == len(problems) > 0
    assert {row["solved"] for row in problems} == {0.25, 0.5, 0.75}
    shutil.rmtree(tmp_path / "logs")
    assert json.loads(fp16rl(*command).stdout) == first
    assert not (tmp_path / "logs").exists(), "a server was started to ask nothing"


def test_a_checkpoint_becomes_a_hugging_face_folder(run, tmp_path):
    """TP2 in the run, one rank here; the same bytes as the export, which came another way."""
    _, folder = run
    latest, hf = folder / "checkpoints" / "latest", tmp_path / "hf"
    run_ranks(1, "servers.fp16rl", arguments=["convert", "to-hf", str(latest), str(hf)])
    names = sorted(file.name for file in (folder / "export").iterdir())
    assert sorted(file.name for file in hf.iterdir()) == names
    for name in names:
        assert (hf / name).read_bytes() == (folder / "export" / name).read_bytes(), name


def test_a_resumed_run_samples_and_learns_as_if_never_stopped(run, tmp_path):
    """Server and learner start again, weights go by the disk: all metrics are the same to the last bit."""
    _, folder = run
    copy, recipe = tmp_path / folder.name, folder / "recipe.yaml"
    wanted = load(recipe)
    with launch_servers(ServerConfig.of(wanted), model_folder(wanted.model), tmp_path) as started:
        assert go_on(folder, 2, copy, recipe, ["sync.transport=disk"], started) == ["", ""]
    assert learnt(copy) == learnt(folder)
    assert steps_of(copy)[-1]["sync/verified_logprob_abs_mean"] < 3e-3
    assert list((copy / "scratch").iterdir()) == []
    assert len((copy / "metrics.undone.jsonl").read_text().splitlines()) == 1
    assert (copy / "checkpoints" / "latest").resolve().name == "step_3"
    first, second = (json.loads((d / "summary.json").read_text()) for d in (folder, copy))
    assert first["accuracy_after"] == second["accuracy_after"]


EVERYTHING = [
    "algorithm.advantage=reinforce_pp_baseline",
    "algorithm.loss=gspo",
    "algorithm.aggregation=sequence_mean",
    "algorithm.correction.ratio=token",
    "algorithm.correction.action=truncate",
    "algorithm.correction.high=2",
    "algorithm.kl.coefficient=0.1",
    "algorithm.overlong.buffer=2",
]


@pytest.mark.parametrize(
    "settings",
    [
        ["learner.distributed_optimizer=true", *EVERYTHING],
        ["learner.pipeline_parallel=2"],
    ],
    ids=["dp2-distributed-optimizer", "pp2"],
)
def test_a_resumed_run_learns_from_the_same_rollouts_to_the_last_bit(settings, run, tmp_path):
    """Without servers: what was sampled is replayed, so nothing but the learner can differ."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = [*replayed(run), "checkpoint.every=2", "learner.tensor_parallel=1", *settings]
    assert make_run(whole, RECIPE, settings) == ["", ""]
    assert go_on(whole, 2, resumed, RECIPE, settings) == ["", ""]
    assert len(steps_of(whole)) == 3
    assert all(row["grad/norm"] > 0 for row in steps_of(whole))
    if "algorithm.loss=gspo" in settings:
        for key in ("loss/kl", "correction/fraction", "correction/weight_mean"):
            assert all(key in row for row in steps_of(whole))
        assert steps_of(whole)[-1]["loss/kl"] > 0, "the reference is that of the first step"
    assert (resumed / "metrics.undone.jsonl").exists(), "the third step was made again"
    assert learnt(resumed) == learnt(whole)
    for file in (whole / "export").glob("*.safetensors"):
        assert file.read_bytes() == (resumed / "export" / file.name).read_bytes()


def test_a_run_that_a_wild_learning_rate_ruins_says_so_and_leaves_what_it_saw(run, tmp_path):
    """The first update sends the weights beyond fp16; the second finds them, on both ranks."""
    errors = make_run(tmp_path, RECIPE, [*replayed(run), "learner.optimizer.lr=1e9"])
    report, sample = (
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
        for name in ("overflow.json", "faults/step_00000.rank_0.json")
    )
    assert report["origin"]["kind"] == "parameter"
    assert report["step"] == sample["step"] == 0
    assert sample["quantity"] == "logit"
    assert set(sample["values"]) == {"nan"}
    recorded = (run[1] / "rollouts" / "step_00000.leader_0.jsonl").read_text().splitlines()
    ids = [(row["prompt"]["ids"], row["ids"]) for row in map(json.loads, recorded)]
    assert (sample["prompt_ids"], sample["response_ids"]) in ids
    for error in errors:
        assert f"parameter {report['origin']['module']} is not finite" in error
        assert "a lower learner.optimizer.lr" in error


def test_a_gate_that_cannot_ring_ends_a_run_which_keeps_what_it_learnt(run, tmp_path):
    """In BF16, where a gate on the loss scale, as all large recipes have it, is passed over."""
    gates = "gates=[{metric: fp16/skipped_total, above: 50}, {metric: mismatch/kl_k33, above: 1}]"
    settings = [gates, "precision=bf16", "trainer.eval_every=2"]
    settings += ["learner.ranks=1", "learner.tensor_parallel=1"]
    (error,) = make_run(tmp_path, RECIPE, [*replayed(run), *settings], ranks=1)
    assert "no metric 'mismatch/kl_k33'; did you mean 'mismatch/kl_k3'" in error
    assert len(steps_of(tmp_path)) == 2
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_2"
