"""fp16rl status --watch: trends, shares and servers of a run; in place on a terminal, else a table a change."""

import json

import pytest
from typer.testing import CliRunner

from launch import lock, outcome, status
from megatron_fp16rl.cli import app, jobs
from megatron_fp16rl.cli.status_table import sparkline
from megatron_fp16rl.utils.files import write_text


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
    run = tmp_path / "run"
    write_text(run / "recipe.yaml", "trainer: {steps: 4}\nrollout: {servers: 2}\n")
    write_text(run / outcome.SERVERS / "1.json", "{}")
    write_text(run / "metrics.jsonl", "".join(json.dumps(row(step)) + "\n" for step in range(3)))
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
        shown = CliRunner().invoke(app, ["status", str(folder)]).output
    assert seen.trends["reward/mean"] == [0.0, 0.1, 0.2]
    assert seen.shares == {"rollout": 0.5, "score": 0.0, "update": 0.25, "sync": 0.0}
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert lines["reward"].split() == ["0.200", "▁▅█"]
    assert lines["mismatch"].split() == ["1.0e-02", "█▅▁"]  # of logarithms
    assert lines["scale"].split() == ["2^15", "▄▄▄"]
    assert lines["servers"].strip() == "1 of 2 alive"
    assert "rollout 50 %, score 0 %, update 25 %, sync 0 %, other 25 %" in lines["step's"]


def test_of_a_run_that_is_over_no_server_is_alive(folder):
    outcome.write(folder, "failed", "NonFinite: x")
    (seen,) = status.read([folder])
    assert seen.servers_up is None
    assert "alive" not in CliRunner().invoke(app, ["status", str(folder)]).output


@pytest.mark.parametrize("terminal", [False, True])
def test_it_is_watched_in_place_on_a_terminal_and_else_a_table_a_change(
    terminal, folder, monkeypatch
):
    def follow(runs, _):
        for steps, state in ((1, "running"), (1, "running"), (2, "running"), (2, "done")):
            yield [status.Status("run", str(runs[0]), state=state, steps_done=steps, steps=2)]

    monkeypatch.setattr(status, "follow", follow)
    for attribute in ("_force_terminal", "is_interactive"):
        monkeypatch.setattr(jobs.console, attribute, terminal)
    monkeypatch.setenv("TERM", "xterm")
    done = CliRunner().invoke(app, ["status", str(folder), "--watch"])
    assert done.exit_code == 0, done.output
    assert done.output.count("1/2") == (2 if terminal else 1)
    assert done.output.count("2/2") == (3 if terminal else 2)  # Live draws its last once more
    assert ("\x1b[1A" in done.output) == terminal  # the cursor goes up
