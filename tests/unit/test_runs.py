"""What status, cancel and sweeps make of run directories, without Slurm."""

import signal
import subprocess
import sys

import pytest

from launch import lock, outcome, slurm, status, sweep
from megatron_fp16rl.cli import jobs as cli_jobs
from megatron_fp16rl.cli.status_table import sparkline
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.utils.files import write_json, write_text
from tests.conftest import ROOT
from tests.runs import fp16rl, run_folder, wait_for


def test_what_became_of_runs_is_told_from_their_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "available", lambda: False)
    row = {"step": 1, "time/step_s": 2.0, "tokens/step": 100, "reward/mean": 0.5}
    earlier = {**row, "step": 0, "eval/accuracy": 0.25, "tokens/step": 300}
    failed = run_folder(tmp_path / "failed", earlier, row, ended=("failed", "NonFinite: [a] b"))
    write_json(failed / "logs/attempt_0/cause.json", {"rank": 1, "cause": "rank 1 was killed"})
    write_text(failed / "logs/attempt_1/rank_0.log", "")
    write_text(failed / "logs/slurm.out", "x\nValueError: [b]\n")
    with (failed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "cut')  # just being written
    run_folder(tmp_path / "died", row)
    away = run_folder(tmp_path / "away", row, jobs=["4711"])
    over = run_folder(tmp_path / "over", row, jobs=["4712"])
    write_text(over / outcome.CANCELLED, "")
    (tmp_path / "no-run").mkdir()

    statuses = {s.run: s for s in status.read(status.all_runs(tmp_path))}
    assert {name: s.state for name, s in statuses.items()} == {
        "failed": "failed",
        "died": "died",
        "away": "unknown",
        "over": "cancelled",
    }
    failure = statuses["failed"]
    assert (failure.steps_done, failure.steps) == (2, 4)
    assert (failure.reward, failure.accuracy, failure.tokens_per_s) == (0.5, 0.25, 100)
    assert failure.left_s is None  # it does not run
    assert failure.causes == ["attempt_0: rank 1 was killed"]
    assert failure.last_error == "ValueError: [b]"
    assert status.find("4711", tmp_path) == away
    assert status.find("died", tmp_path) == status.find(str(tmp_path / "died"), tmp_path)

    one = fp16rl("status", "failed", "--root", tmp_path)
    assert "NonFinite: [a] b" in one.output  # text, not markup
    assert "ValueError: [b]" in one.output
    write_json(failed / "logs/attempt_1/cause.json", {"cause": "rank 0 hung"})
    assert status.read([failed])[0].last_error == "rank 0 hung"  # before any last words
    table = fp16rl("status", "--root", tmp_path)
    assert all(name in table.output for name in statuses)
    watched = fp16rl("status", "died", "--root", tmp_path, "--watch", code=1)
    assert watched.output.count("2/4") == 1  # one table, and nothing changes
    absent = fp16rl("status", "absent", "--root", tmp_path, code=2)
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
    runs = [run_folder(folder / name) for name in ("lr-1", "lr-2")]
    other = run_folder(tmp_path / "other")
    assert status.find("lr", tmp_path) == folder
    assert status.all_runs(folder) == runs
    assert set(status.all_runs(tmp_path)) == {*runs, other}
    with pytest.raises(RecipeError):  # `cancel runs` ends nothing
        status.find(str(tmp_path), tmp_path)


def test_sweeps_that_make_no_sense_are_refused():
    for axes in (
        *(["trainer.seed"], ["trainer.seed=1,,2"], ["trainer.seed=1,1"], ["name=a,b"]),
        *(["trainer.seed=1", "trainer.seed=2"], ["task.path=a/b,a_b"]),
    ):
        with pytest.raises(RecipeError, match="--sweep"):
            sweep.points(axes)


def test_names_of_a_sweep_tell_its_values():
    assert list(sweep.points(["a.lr=1e-6,3e-6", "t.seed=0,1"]).items())[1:3] == [
        ("lr-1e-6-seed-1", ["a.lr=1e-6", "t.seed=1"]),
        ("lr-3e-6-seed-0", ["a.lr=3e-6", "t.seed=0"]),
    ]
    settings = [["r.sglang={a: 1, b: 2}"], ["r.sglang={}"]]
    assert list(sweep.points(["r.sglang={a: 1, b: 2},{}"]).values()) == settings


# Trends, shares and servers; followed in place on a terminal, else a table a change


def row(step):
    return {
        "step": step,
        "reward/mean": step / 10,
        "mismatch/logprob_abs_mean": 10.0**-step,
        "fp16/loss_scale": 2.0**15,
        "time/step_s": 2.0,
        "time/rollout_wait_s": 1.0,
        "time/update_s": 0.5,
    }


@pytest.fixture
def folder(tmp_path):
    settings = "trainer: {steps: 4}\nrollout: {servers: 2}\n"
    run = run_folder(tmp_path / "run", *map(row, range(3)), recipe=settings)
    write_text(run / outcome.SERVERS / "1.json", "{}")
    return run


def test_a_line_of_bars_has_the_shape_of_the_values():
    assert sparkline([0.0, 1.0, 7.0]) == "▁▂█"
    assert sparkline([5.0, 5.0]) == "▄▄"
    assert sparkline(list(range(80)), width=8) == "▁▂▃▄▅▆▇█"
    zigzag = sparkline([1.0] * 25 + [0.1] * 50 + [0.55] * 25)  # means of two and of three values
    assert len(zigzag) == 40
    assert set(zigzag[-9:]) == {"▅"}


def test_a_run_that_goes_on_has_trends_shares_and_servers(folder):
    with lock.alone_in(folder):
        (seen,) = status.read([folder])
        shown = fp16rl("status", folder).output
    assert seen.trends["reward/mean"] == [0.0, 0.1, 0.2]
    assert seen.shares == {"rollout": 0.5, "score": 0.0, "update": 0.25, "sync": 0.0}
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert lines["reward"].split() == ["0.200", "▁▅█"]
    assert lines["mismatch"].split() == ["1.0e-02", "█▅▁"]  # of logarithms
    assert lines["scale"].split() == ["2^15", "▄▄▄"]
    assert lines["servers"].strip() == "1 of 2 alive"
    assert "rollout 50 %, score 0 %, update 25 %, sync 0 %, other 25 %" in lines["step's"]
    # When it is over no server is alive.
    outcome.write(folder, "failed", "NonFinite: x")
    assert status.read([folder])[0].servers_up is None
    assert "alive" not in fp16rl("status", folder).output


@pytest.mark.parametrize("terminal", [False, True])
def test_it_is_watched_in_place_on_a_terminal_and_else_a_table_a_change(
    terminal, folder, monkeypatch
):
    def follow(runs, _):
        for steps, state in ((1, "running"), (1, "running"), (2, "running"), (2, "done")):
            yield [status.Status("run", str(runs[0]), state=state, steps_done=steps, steps=2)]

    monkeypatch.setattr(status, "follow", follow)
    for attribute in ("_force_terminal", "is_interactive"):
        monkeypatch.setattr(cli_jobs.console, attribute, terminal)
    monkeypatch.setenv("TERM", "xterm")
    done = fp16rl("status", folder, "--watch")
    assert done.output.count("1/2") == (2 if terminal else 1)
    assert done.output.count("2/2") == (3 if terminal else 2)  # Live draws its last once more
    assert ("\x1b[1A" in done.output) == terminal  # the cursor goes up
