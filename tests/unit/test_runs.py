"""What status, cancel and sweeps make of run directories, without Slurm."""

import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from launch import lock, outcome, slurm, status, sweep
from megatron_fp16rl.cli import app
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.utils.files import write_json, write_text
from tests.conftest import ROOT
from tests.runs import wait_for


def run_folder(root, name, *metrics, ended=None):
    folder = root / name
    write_text(folder / "recipe.yaml", "trainer: {steps: 4}\n")
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))
    if ended:
        outcome.write(folder, *ended)
    return folder


def test_what_became_of_runs_is_told_from_their_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "available", lambda: False)
    row = {"step": 1, "time/step_s": 2.0, "tokens/step": 100, "reward/mean": 0.5}
    earlier = {**row, "step": 0, "eval/accuracy": 0.25, "tokens/step": 300}
    failed = run_folder(tmp_path, "failed", earlier, row, ended=("failed", "NonFinite: [a] b"))
    write_json(failed / "logs/attempt_0/cause.json", {"rank": 1, "cause": "rank 1 was killed"})
    write_text(failed / "logs/attempt_1/rank_0.log", "")
    write_text(failed / "logs/slurm.out", "x\nValueError: [b]\n")
    with (failed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "cut')  # just being written
    run_folder(tmp_path, "died", row)
    away = run_folder(tmp_path, "away", row)
    slurm.record(away, "4711")
    over = run_folder(tmp_path, "over", row)
    slurm.record(over, "4712")
    (over / "private").mkdir()
    (over / outcome.CANCELLED).touch()
    (tmp_path / "no-run").mkdir()

    statuses = {s.run: s for s in status.read(status.all_runs(tmp_path))}
    assert {name: s.state for name, s in statuses.items()} == {
        "failed": "failed",
        "died": "died",
        "away": "unknown",
        "over": "cancelled",
    }
    failure = statuses["failed"]
    assert (failure.steps_done, failure.steps, failure.reward, failure.accuracy) == (
        2,
        4,
        0.5,
        0.25,
    )
    assert failure.tokens_per_s == 100
    assert failure.left_s is None  # it does not run
    assert failure.causes == ["attempt_0: rank 1 was killed"]
    assert failure.last_error == "ValueError: [b]"
    assert status.find("4711", tmp_path) == away
    assert status.find("died", tmp_path) == status.find(str(tmp_path / "died"), tmp_path)

    one = CliRunner().invoke(app, ["status", "failed", "--root", str(tmp_path)])
    assert "NonFinite: [a] b" in one.output  # text, not markup
    assert "ValueError: [b]" in one.output
    write_json(failed / "logs/attempt_1/cause.json", {"cause": "rank 0 hung"})
    assert status.read([failed])[0].last_error == "rank 0 hung"  # before any last words
    table = CliRunner().invoke(app, ["status", "--root", str(tmp_path)])
    assert all(name in table.output for name in statuses)
    watched = CliRunner().invoke(app, ["status", "died", "--root", str(tmp_path), "--watch"])
    assert watched.exit_code == 1
    assert watched.output.count("2/4") == 1  # one table, and nothing changes
    absent = CliRunner().invoke(app, ["status", "absent", "--root", str(tmp_path)])
    assert absent.exit_code == 2
    assert "there is no run absent" in absent.stderr


def test_a_launcher_is_ended(tmp_path):
    write_text(tmp_path / "recipe.yaml", "trainer: {steps: 3}\n")
    code = (
        "import sys, time; from pathlib import Path; from launch.lock import alone_in\n"
        "with alone_in(Path(sys.argv[1])): time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    try:
        wait_for(lambda: lock.holder(tmp_path), 240, "the lock")
        status.cancel(tmp_path, save=False)
        assert holder.wait(240) == -signal.SIGTERM
    finally:
        holder.kill()


def test_a_sweep_is_a_folder_of_runs_and_a_root_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "available", lambda: False)
    folder = sweep.new_folder(tmp_path, "lr", ["a.lr=1,2"])
    runs = [run_folder(folder, name) for name in ("lr-1", "lr-2")]
    other = run_folder(tmp_path, "other")
    assert status.find("lr", tmp_path) == folder
    assert status.all_runs(folder) == runs
    assert set(status.all_runs(tmp_path)) == {*runs, other}
    with pytest.raises(RecipeError):  # `cancel runs` ends nothing
        status.find(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "axes",
    [
        *(["trainer.seed"], ["trainer.seed=1,,2"], ["trainer.seed=1,1"], ["name=a,b"]),
        *(["trainer.seed=1", "trainer.seed=2"], ["task.path=a/b,a_b"]),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(axes):
    with pytest.raises(RecipeError, match="--sweep"):
        sweep.points(axes)


def test_names_of_a_sweep_tell_its_values():
    assert list(sweep.points(["a.lr=1e-6,3e-6", "t.seed=0,1"]).items())[1:3] == [
        ("lr-1e-6-seed-1", ["a.lr=1e-6", "t.seed=1"]),
        ("lr-3e-6-seed-0", ["a.lr=3e-6", "t.seed=0"]),
    ]
    settings = [["r.sglang={a: 1, b: 2}"], ["r.sglang={}"]]
    assert list(sweep.points(["r.sglang={a: 1, b: 2},{}"]).values()) == settings
