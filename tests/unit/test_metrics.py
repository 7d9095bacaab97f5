"""Files of a run that a kill, a full disk or a person has damaged: what is whole is used, the rest named."""

import json
import shutil
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.metrics import log as metrics
from megatron_fp16rl.metrics.run import Run
from megatron_fp16rl.recipe import Suite
from megatron_fp16rl.rollout.evaluation import Questions, respond
from megatron_fp16rl.rollout.recording import read_samples
from megatron_fp16rl.tools import sanity
from megatron_fp16rl.tools.bench import step as bench_step
from megatron_fp16rl.tools.rehearse import checks
from megatron_fp16rl.tools.report import figures
from megatron_fp16rl.tools.report import page as report_page
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import Unreadable, write_json
from tests.models import recipe
from tests.unit.damage import DAMAGE, put

ROW = {
    "reward/mean": 0.5,
    "mismatch/logprob_abs_mean": 1e-4,
    "mismatch/seq_log_ratio_std": 1e-3,
    "mismatch/kl_k3": 1e-8,
    "time/step_s": 2.0,
    "tokens/step": 100,
    "fp16/overflow_source": None,
}
LINES = [json.dumps({"step": step, **ROW}).encode() + b"\n" for step in range(4)]
# Of what is no JSON at all, see test_files.py.
BAD_LINES = {
    "cut": LINES[1][:50] + b"\n",
    "empty": b"\n",
    "list": b"[1, 2]\n",
    "no step": b'{"reward/mean": 1.0}\n',
    "step that is text": b'{"step": "1"}\n',
    "metric that is text": b'{"step": 1, "reward/mean": "high"}\n',
    "metric that is a list": b'{"step": 1, "x": [1]}\n',
    "infinite": b'{"step": 1, "reward/mean": 1e999}\n',
    "too large to divide": b'{"step": 1, "tokens/step": 1' + b"0" * 400 + b"}\n",
    "flag": b'{"step": 1, "reward/mean": true}\n',
    "half a character": b'{"step": 1, "\\ud800": 1}\n',
    "binary": b"\x00\xff\xfe\x80\n",
    "two writers": LINES[1][:-1] + LINES[1],
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(LINES))
    (tmp_path / "recipe.yaml").write_text(recipe().to_yaml())
    return tmp_path


def damage(run, line):
    (run / "metrics.jsonl").write_bytes(b"".join([LINES[0], line, *LINES[2:]]) + LINES[0][:30])


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_one_bad_line_of_metrics_takes_no_other_with_it(line, run):
    damage(run, line)
    log = metrics.read(run)
    assert [row["step"] for row in log.rows] == [0, 2, 3]
    (fault,) = log.faults  # the last line is cut, as a kill leaves it: that is none
    assert fault.startswith(f"{run}/metrics.jsonl, line 2, is no step: ")
    assert len(fault) < 400


def test_of_a_step_that_is_there_twice_the_later_line_counts(run, capsys):
    """As if somebody had joined the files of two attempts, or two runs had written into one."""
    again = [
        json.dumps({"step": step, **ROW, "reward/mean": 1.0}).encode() + b"\n" for step in (2, 3)
    ]
    (run / "metrics.jsonl").write_bytes(b"".join([*LINES, *again]))
    log = metrics.read(run)
    assert [(row["step"], row["reward/mean"]) for row in log.rows] == [
        (0, 0.5),
        (1, 0.5),
        (2, 1.0),
        (3, 1.0),
    ]
    (fault,) = log.faults
    assert fault.endswith(
        "line 5, is step 2 after step 3: of steps 2 to 3 the lines before it do not count"
    )
    with Run(recipe(), run, SimpleNamespace(is_rank0=True)) as goes_on:
        goes_on.resume(3, 0)
    assert (run / "metrics.jsonl").read_bytes() == b"".join([*LINES[:2], again[0]])
    assert (run / "metrics.undone.jsonl").read_bytes() == b"".join([*LINES[2:], again[1]])


def test_a_run_goes_on_beside_a_bad_line(run, capsys):
    damage(run, BAD_LINES["cut"])
    goes_on = Run(recipe(), run, SimpleNamespace(is_rank0=True))
    with goes_on:
        goes_on.resume(3, 0)
    assert [row["step"] for row in goes_on.history] == [0, 2]
    assert "metrics.jsonl, line 2, is no step" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == LINES[0] + LINES[2]
    assert (run / "metrics.undone.jsonl").read_bytes() == BAD_LINES["cut"] + LINES[3]
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(Unreadable, match=r"metrics.jsonl cannot be read: Is a directory"):
        goes_on.resume(3, 0)


def logged(folder, name, *values, gates=()):
    """Of a run with a step for each of these values of a metric: what its file has."""
    folder.mkdir()
    with Run(recipe(gates=[*gates]), folder, SimpleNamespace(is_rank0=True)) as run:
        run.resume(0, 0)
        for step, value in zip(run.steps(), values, strict=False):
            run.record({"reward/mean": 0.0, name: value})
            run.finish(step)
    return [row[name] for row in metrics.read(folder).rows]


def test_a_statistic_that_is_no_number_ends_no_run_but_passes_no_gate(tmp_path, capsys):
    """What a user's loss counts may be a mean over nothing, once in a thousand steps."""
    nan, inf = float("nan"), float("inf")
    assert logged(tmp_path / "a", "loss/mine", 0.5, nan, inf) == [0.5, None, None]
    assert "step 2: loss/mine is nan, and logged as null" in capsys.readouterr().out
    gate = {"metric": "loss/mine", "above": 1.0}
    with pytest.raises(FinalError, match="step 1: the metric loss/mine is nan"):
        logged(tmp_path / "b", "loss/mine", nan, gates=[gate])
    with pytest.raises(FinalError, match="step 1: the metric mismatch/kl_k3 is nan"):
        logged(tmp_path / "c", "mismatch/kl_k3", nan)


def test_whoever_reads_metrics_goes_on_and_says_what_is_damaged(run):
    damage(run, BAD_LINES["binary"])
    assert bench_step.measure(run, 1)["steps"] == 2
    measured = sanity.measure(run)
    assert (measured["steps"], measured["collapsed"]) == (3, False)
    for result in (bench_step.measure(run, 1), measured):
        assert "line 2, is no step" in result["faults"][0]
    with pytest.raises(checks.Failed, match="line 2, is no step"):
        checks.read_steps(run)


def test_a_damaged_cell_is_shown_beside_the_others(run, tmp_path):
    rows, grid = [], tmp_path / "grid"
    for dtype, file in (("fp16", "metrics.jsonl"), ("bf16", "failed.json")):
        cell = grid / "cells" / f"gspo-{dtype}"
        cell.mkdir(parents=True)
        shutil.copy(run / "metrics.jsonl", cell)
        (cell / file).unlink(missing_ok=True)
        (cell / file).mkdir()
        rows.append({"algorithm": "gspo", "dtype": dtype, **sanity.measure(cell)})
        assert f"{cell / file} cannot be read: Is a directory" in rows[-1]["reason"]
    assert sanity.write_curves(grid, rows).stat().st_size > 0


SUMMARY = {
    "accuracy_before": 0.1,
    "accuracy_after": 0.2,
    "wall_s": 1.0,
    "shares": {"rollout": 1.0},
    "skipped_total": 0,
    "mismatch_logprob_abs_mean": 1e-4,
    "steps": 4,
}
SAMPLE = {"prompt": {"text": "1+1=", "answer": "2"}, "text": "2", "reward": 1.0, "truncated": False}


@pytest.mark.parametrize("how", ["cut", "rubbish", "folder", "[]", "{}"])
@pytest.mark.parametrize("name", ["summary.json", "samples/before.json", "samples/after.json"])
def test_a_report_leaves_out_what_is_damaged_and_says_so(name, how, run, monkeypatch):
    monkeypatch.setattr(figures, "overview", lambda *_: None)  # drawn by tests/unit/test_cli.py
    monkeypatch.setattr(figures, "to_svg", lambda _: "<svg>")
    write_json(run / "summary.json", SUMMARY)
    for when in ("before", "after"):
        write_json(run / "samples" / f"{when}.json", [SAMPLE])
    DAMAGE[how](run / name) if how in DAMAGE else put(run / name, how.encode())
    warnings = []
    page = report_page.write_report(run, warnings.append).read_text()
    is_fine = how == "[]" and "samples" in name
    assert [f"{run / name} is left out" in line for line in warnings] == ([] if is_fine else [True])
    assert "<svg" in page
    assert ("1+1=" in page) == (name != "samples/before.json")


@pytest.mark.parametrize("how", ["empty", "rubbish", "gone"])
def test_without_a_step_there_is_no_report_and_the_command_says_so(how, run):
    DAMAGE[how](run / "metrics.jsonl")
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 2
    assert "holds no metrics.jsonl with a step" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "content", [b"{\n", b"[]\n", b"\x00\xff\n", b"{}\n", b'{"prompt": {}}\n', b"7\n"]
)
def test_damaged_recordings_and_responses_are_named(content, tmp_path):
    (tmp_path / "step_00000.leader_0.jsonl").write_bytes(content)
    with pytest.raises(FinalError, match=r"step_00000.leader_0.jsonl"):
        read_samples(tmp_path, 0)
    (tmp_path / "responses_00000.jsonl").write_bytes(b'{"problem": 0}\n' + content[:-1] + b"}{\n")
    with pytest.raises(Unreadable, match=r"responses_00000.jsonl, line 2, .*; remove it, and"):
        respond([], Questions(Suite(suite="held-out:greedy"), None, [None], None), folder=tmp_path)
