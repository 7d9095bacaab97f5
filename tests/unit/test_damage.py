"""Run directories that a kill, a full disk or a person has damaged: each command shows the others."""

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import lock, outcome, slurm, status
from megatron_fp16rl.cli import app
from megatron_fp16rl.recipe import load
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import write_json, write_text
from tests.conftest import ROOT
from tests.unit.damage import DAMAGE

# What is shown as damaged whatever has become of it; of others, lines stand alone.
STRICT = ("recipe.yaml", "metrics.jsonl", "private/outcome", "logs/attempt_0/cause.json")
LOOSE = ("jobs", ".lock", "private", "logs", "logs/attempt_0", "logs/slurm.out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs a, b and c, with every file that commands read."""
    root, recipe = (
        tmp_path_factory.mktemp("whole"),
        load(ROOT / "recipes/tiny/dense-grpo-fp16.yaml"),
    )
    rows = [{"step": s, "time/step_s": 1.0, "reward/mean": 0.5, "tokens/step": 9} for s in range(3)]
    for folder in (root / name for name in "abc"):
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        write_text(folder / "logs/attempt_0/recipe.yaml", recipe.to_yaml())
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        cause = {"rank": 1, "cause": "rank 1 was killed"}
        write_json(folder / "logs/attempt_0/cause.json", cause)
        write_text(folder / "logs/slurm.out", "ValueError: first\n")
        outcome.write(folder, outcome.FAILED, "a gate")
        slurm.record(folder, "4711")
        with lock.alone_in(folder):
            pass
    return root


@pytest.fixture
def root(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "available", lambda: False)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in "abc":
        (tmp_path / name / "jobs").write_text("4711\n")
    return tmp_path


def seen(root):
    return {s.run: asdict(s) for s in status.read(status.all_runs(root))}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*STRICT, *LOOSE])
def test_a_damaged_run_is_shown_with_what_is_wrong_and_so_are_the_others(name, how, root):
    before = seen(root)
    DAMAGE[how](root / "b" / name)
    after = seen(root)
    assert after.keys() == before.keys()
    assert [after[run] for run in "ac"] == [before[run] for run in "ac"]
    faults = after["b"]["faults"]
    assert all(str(root / "b") in fault for fault in faults)
    # What may be absent is so, too, where a link leads nowhere; and a kill cuts metrics.
    is_absent = how in ("gone", "dangling") and name != "recipe.yaml"
    is_cut_by_a_kill = name == "metrics.jsonl" and how in ("empty", "cut")
    if name in STRICT and not is_absent and not is_cut_by_a_kill:
        assert any(str(root / "b" / name) in fault for fault in faults)
    if name == "recipe.yaml":
        assert "as it was last started: " in faults[0]
    with contextlib.suppress(OSError, ExplainedError):  # which commands explain
        assert status.cancel(root / "b", save=False) == []


@pytest.mark.parametrize("how", ["rubbish", "folder"])
def test_commands_on_a_root_with_a_damaged_run_show_it(how, root):
    def said(*command):
        done = CliRunner().invoke(app, [*map(str, command)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    for name in STRICT:
        DAMAGE[how](root / "b" / name)
    code, shown = said("status", "--root", root)
    assert code == 0
    assert [run in shown for run in ("a ", "b ", "c ")] == [True] * 3
    assert f"{root}/b/recipe.yaml" in shown
    assert said("status", "b", "--root", root)[1].count("damaged") >= 4
    for command in (
        ["report"],
        ["train", "--resume"],
        ["submit", "--resume"],
        ["bench", "step", "--run"],
    ):
        code, shown = said(*command, root / "b")
        assert code in (1, 2)
        assert "error: " in shown
        assert f"{root}/b" in shown
        assert "--resume" not in command or "as it was last started: " in shown
    _, shown = said("eval", root / "b", "--suite", "held-out:avg@1")
    assert "has no export/ yet: fp16rl convert to-hf" in shown


def test_numbers_that_no_step_has_are_shown_as_they_stand(root):
    row = {"step": 0, "time/step_s": 1.0, "fp16/loss_scale": -1.0, "fp16/skipped_total": 1.5}
    (root / "b" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for command in (
        ["status", "--root", str(root), "b"],
        ["report", str(root / "a"), str(root / "b")],
    ):
        assert CliRunner().invoke(app, command).exit_code == 0


def test_a_run_that_may_not_be_looked_into_is_shown_beside_the_others(whole):
    """As another user of a shared root sees it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("a", "b"):
            shutil.copytree(whole / name, root / name)
        (root / "b").chmod(0)
        (root / "a").chmod(0o755)
        (root / "a" / "metrics.jsonl").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(root / "b", 0, 0)
            os.seteuid(65534)
        try:
            states = seen(root)
        finally:
            if is_root:
                os.seteuid(0)
            (root / "b").chmod(0o700)
    assert states["b"]["state"] == "unknown"
    assert "Permission denied" in states["b"]["faults"][0]
    assert f"{root}/a/metrics.jsonl cannot be read: Permission denied" in states["a"]["faults"]


def test_a_copy_has_not_the_jobs_of_the_run_and_a_moved_one_has(root):
    slurm.record(root / "a", "4712")
    shutil.copytree(root / "a", root / "copy")
    assert slurm.jobs(root / "copy") == []
    slurm.record(root / "copy", "4713")
    assert slurm.jobs(root / "copy") == ["4713"]
    (root / "a").rename(root / "moved")
    assert slurm.jobs(root / "moved") == ["4711", "4712"]


def test_attempts_are_counted_from_the_last_whoever_tidied_up(tmp_path):
    for name in ("attempt_3", "attempt_10", "attempt_x", "attempt_11.bak", "attempt_2~"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    assert [logs.name for logs in outcome.attempts(tmp_path)] == ["attempt_3", "attempt_10"]
    assert outcome.begin_attempt(tmp_path).name == "attempt_11"
    assert outcome.attempt(tmp_path).name == "attempt_11"
