"""The command line: help with examples, exit codes, JSON, and files that are whole or absent."""

import json

import pytest
import typer
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.recipe import load
from tests.conftest import python

runner = CliRunner()
TINY, SMOLLM2 = "recipes/tiny/dense-grpo-fp16.yaml", "recipes/tiny/smollm2-math-fp16.yaml"
SUITES = "trainer.suites=[{suite: 'absent.jsonl:avg@2'}]"


def commands(group, *names):
    """Words of every command below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield [*names, name]


@pytest.mark.parametrize("command", commands(typer.main.get_command(app)), ids=" ".join)
def test_every_command_explains_itself_with_an_example(command):
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"fp16rl {' '.join(command)}" in result.output


def test_commands_start_without_torch_which_takes_seconds():
    code = "import sys, megatron_fp16rl.cli, launch.status; print('torch' in sys.modules)"
    assert python("-c", code).stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["train", TINY, "--set", "trainer.stepz=1"], "did you mean 'steps'"),
        (["train", SMOLLM2, "--set", "task.path=absent.jsonl"], "there is no file absent.jsonl"),
        (["train", SMOLLM2, "--set", SUITES], "there is no file absent.jsonl"),
        (["train", SMOLLM2, "--set", "model.path=absent"], "there is no Hugging Face folder"),
        (["train", TINY, "--name", ""], "name = ''"),
        (
            ["train", TINY, "--set", "rollout.replay=absent"],
            "rollout.replay=absent holds no recorded samples",
        ),
        (
            ["eval", ".", "--suite", "a.jsonl:avg@2", "--top-p", "0"],
            "--suite a.jsonl:avg@2: top_p=0.0: ",
        ),
        (["train", "--resume", "nowhere"], "nowhere is no run's directory: it has no recipe.yaml"),
        (["doctor", "--set", "trainer.steps=1"], "--set goes with --warm"),
        (["cancel", ""], "there is no run "),
        (["report", "nowhere"], "nowhere holds no metrics.jsonl"),
        (["eval", "nowhere", "--suite", "a.jsonl:avg@2"], "nowhere is neither a run directory nor"),
        (["eval", ".", "--suite", "a.jsonl:best"], "write FILE:METRIC"),
        (["selftest", "--only", "taste"], "there is no 'taste'; there are environment, "),
        (["selftest", "--gpus", "99"], "--gpus 99: "),
        (["bench", "sanity", "--only", "ppo"], "--only ppo: there are grpo, "),
    ],
)
def test_bad_usage_exits_with_2_and_says_why(arguments, message):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_is_written_into_no_folder_that_holds_something(tmp_path):
    """All that stood there would be gone."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for target in ("mine", "link", "mine/thesis.tex"):
        for command in (["smollm2"], ["mxfp4", "absent"], ["to-hf", "absent"]):
            result = runner.invoke(app, ["convert", *command, str(tmp_path / target)])
            assert (result.exit_code, result.stdout) == (2, "")
            assert f"{tmp_path / target} is there already: choose another folder" in result.stderr
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "kept"


def test_a_link_that_leads_to_itself_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for command in (
        ["report"],
        ["eval", "--suite=a.jsonl:avg@2"],
        ["train", "--resume"],
        ["submit", "--resume"],
    ):
        result = runner.invoke(app, [*command, str(tmp_path / "loop")])
        assert isinstance(result.exception, SystemExit), result.exception
        assert str(tmp_path / "loop") in result.stderr


def test_what_the_model_refuses_is_said_before_anything_starts(tmp_path):
    settings = ("learner.ranks=4", "learner.tensor_parallel=4", f"trainer.run_root={tmp_path}")
    result = runner.invoke(app, ["train", TINY, *(f"--set={setting}" for setting in settings)])
    assert result.exit_code == 2
    assert "tensor_parallel=4 does not divide" in result.stderr
    assert "Traceback" not in result.stderr
    assert "starting" not in result.stdout
    assert not list(tmp_path.glob("*/logs/*/*.log"))


def test_report_of_an_unfinished_run(tmp_path):
    mismatch = {"logprob_abs_mean": 1e-4, "seq_log_ratio_std": 1e-3, "kl_k3": 1e-8}
    row = {"step": 0, "reward/mean": 0.5, "fp16/loss_scale": 1024.0, "fp16/skipped_total": 1}
    row |= {f"mismatch/{name}": value for name, value in mismatch.items()}
    run = tmp_path / r"run$\frac$"  # a formula, if a picture took it for one
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "recipe.yaml").write_text("name: <b>unfinished</b>\n")
    result = runner.invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    page = (run / "report.html").read_text()
    assert "has not ended: 1 steps so far" in page
    assert "&lt;b&gt;unfinished" in page, "what a run wrote is text, not markup"


def test_what_is_sent_around_holds_no_values_of_the_environment(tmp_path):
    settings = ["slurm.environment.TOKEN=hush-hush", "slurm.setup=['echo ${HOME}']"]
    recipe = load(TINY, settings)
    assert "hush-hush" in recipe.to_yaml()  # a requeued job has no other source
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    assert runner.invoke(app, ["report", str(tmp_path)]).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "TOKEN: (not shown)" in page
    assert "echo ${HOME}" in page
    (tmp_path / "other.yaml").write_text(recipe.to_yaml().replace("hush-hush", "also secret"))
    files = [str(tmp_path / "recipe.yaml"), str(tmp_path / "other.yaml")]
    for how in ([], ["--json"]):
        shown = runner.invoke(app, ["recipes", "diff", *files, *how]).stdout
        assert "slurm.environment.TOKEN" in shown
        assert "secret" not in page + shown
        assert "hush-hush" not in page + shown
    command = ["train", files[0], "--set", "slurm.environment.X=hush-hush`id`"]
    refused = runner.invoke(app, command)
    assert refused.exit_code == 2
    assert "slurm.environment.X: is taken literally" in refused.stderr
    assert "hush-hush" not in refused.stderr
