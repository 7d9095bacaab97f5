"""`fp16rl selftest`: verdicts, and the report's shape."""

import ast
import json
import math
from itertools import combinations

import pytest
import torch
from pydantic import ValidationError

from launch import outcome
from megatron_fp16rl.tools.selftest import (
    collectives,
    layouts,
    parity,
    process,
    ranks,
    speed,
    waits,
)
from megatron_fp16rl.tools.selftest.models import random_tokens
from megatron_fp16rl.tools.selftest.result import Answer, Report, at_least, at_most, equal
from megatron_fp16rl.tools.selftest.rows import ROWS, Row
from megatron_fp16rl.tools.selftest.run import judge, run
from tests.conftest import ROOT
from tests.runs import fp16rl

ROW = Row("what it asks", "where bounds come from", lambda setting: [])


def test_the_help_names_every_row():
    shown = fp16rl("selftest", "--help").output
    assert f"Rows: {', '.join(ROWS)}." in " ".join(shown.split())
    assert all(row.what and row.source for row in ROWS.values())


def test_bounds_hold_or_not_and_nan_never_does():
    for check, good, bad, bound in (
        (at_most, 1, 1.1, 1),
        (at_least, 1, 0.9, 1),
        (equal, 0.5, 0.6, 0.5),
        (equal, "skipped", "made", "skipped"),
    ):
        assert check("a", good, bound).holds
        assert not check("a", bad, bound).holds
        assert not check("a", math.nan, bound).holds
    values = [at_most("a", value, 1e-5).value for value in (math.nan, math.inf)]
    assert values == ["nan", "inf"]  # which JSON has no numbers for
    assert at_most("a", 1, 1e-5).bound == "<= 1e-05"


def test_a_row_passes_if_it_checked_something_and_all_holds():
    good, bad = at_most("good", 1, 2), at_most("bad", 3, 2)
    passed = judge("row", ROW, Answer(checks=[good]), 1.5)
    assert (passed.status, passed.failed, passed.reason) == ("pass", [], None)
    assert (passed.measured, passed.bound) == ({"good": 1}, {"good": "<= 2"})
    assert (passed.source, passed.what, passed.seconds) == (ROW.source, ROW.what, 1.5)
    failed = judge("row", ROW, Answer(checks=[good, bad]), 1)
    assert (failed.status, failed.failed) == ("fail", ["bad"])
    absent = judge("row", ROW, Answer(not_here="no GPU"), 1)
    assert (absent.status, absent.reason) == ("not here", "no GPU")
    nothing = judge("row", ROW, Answer(), 1)
    assert (nothing.status, nothing.reason) == ("fail", "it checked nothing")
    ended = judge("row", ROW, "SIGSEGV ended its process", 1, "the log")
    assert (ended.status, ended.log) == ("fail", "the log")
    assert ended.reason == "SIGSEGV ended its process"


def test_rows_that_crash_or_hang_fail_and_the_next_one_runs():
    rows = {
        "absent": ROW,  # the row's process does not know it
        "parity": Row("hangs", "", ROW.run, timeout_s=0.01),
        "products": ROWS["products"],
    }
    said = []
    report = run(["absent", "parity"], True, said.append, rows)
    crashed, late = report.rows
    assert crashed.status == late.status == "fail"
    assert crashed.reason == "KeyError: 'absent'"
    assert "Traceback" in crashed.log
    assert late.reason == "it took more than 0.01 s"
    assert not report.passed
    assert [line.partition(":")[0] for line in said] == ["absent"] * 2 + ["parity"] * 2


def test_the_report_has_one_shape():
    """What programs read: no key may go, and no other come."""
    row = judge("row", ROW, Answer(checks=[at_most("a", math.nan, 2)]), 1)
    report = Report(passed=False, quick=True, machine={"platform": "x"}, rows=[row])
    text = report.model_dump_json()
    assert Report.model_validate_json(text) == report
    values = json.loads(text, parse_constant=pytest.fail)  # JSON has no nan
    assert set(values) == {"passed", "quick", "machine", "rows"}
    named = {"name", "host", "what", "status", "measured", "bound", "source", "seconds"}
    assert set(values["rows"][0]) == named | {"reason", "failed", "log"}
    with pytest.raises(ValidationError):
        Report.model_validate({**values, "rows": [{**values["rows"][0], "status": "maybe"}]})


def test_the_tables_last_line_counts_and_the_exit_code_follows(monkeypatch, tmp_path):
    from megatron_fp16rl.tools.selftest import run as module

    rows = [
        judge("parity", ROW, Answer(checks=[at_most("logits", 1e-6, 1e-5)]), 1),
        judge("waits", ROW, Answer(not_here="no GPU"), 1),
        judge("memory", ROW, "KeyError: 'x'", 1, "Traceback ..."),
    ]
    asked = []
    machine = {"platform": "CPU", "when": "now", "hosts": ["h"]}
    machine["versions"] = {"torch": "<b>2.13</b>"}
    out, html = tmp_path / "deep" / "selftest.json", tmp_path / "selftest.html"
    for kept, code in ((rows, 1), (rows[:2], 0)):
        report = Report(passed=not code, quick=True, machine=machine, rows=kept)
        monkeypatch.setattr(module, "run", lambda *a, report=report: asked.append(a[:2]) or report)
        shown = fp16rl("selftest", "--out", out, "--html", html, code=code)
        assert "1 pass" in shown.output
        assert "1 not here" in shown.output
        assert ("Traceback" in shown.output) == bool(code)
        assert Report.model_validate_json(out.read_text()) == report
        page = html.read_text()
        assert f"selftest: {'failed' if code else 'passed'}" in page
        assert "&lt;b&gt;2.13" in page
        assert "&lt;= 1e-05" in page
        assert ('class="bad"' in page) == bool(code)
    fp16rl("selftest", "--quick")
    quick = [name for name, row in ROWS.items() if row.in_quick]
    assert asked == [(list(ROWS), False)] * 2 + [(quick, True)]


def test_a_slow_link_and_a_wrong_sum_fail():
    equal_links = [(a, b, a // 2 == b // 2, 4e9) for a, b in combinations(range(4), 2)]
    good = {"wrong": [], "bandwidths": {"all_reduce": 1e9}, "pairs": equal_links}
    assert all(check.holds for check in collectives.judge([good, good], 1 << 20, True))
    slow = [(a, b, near, 1e9 if (a, b) == (1, 2) else 4e9) for a, b, near, _ in equal_links]
    checks = collectives.judge(
        [{**good, "pairs": slow}, {**good, "wrong": ["sum of int32"]}], 1 << 20, True
    )
    failed = [(check.name, check.value) for check in checks if not check.holds]
    assert failed == [
        ("operations that brought other numbers", "sum of int32"),
        ("slowest pair of two machines over a usual one", 0.25),
    ]
    on_cpus = collectives.judge([{**good, "pairs": slow}], 1 << 20, False)
    assert all(check.holds for check in on_cpus)
    assert {check.value for check in checks if check.name.startswith("that pair")} == {
        *("ranks 0 and 1", "ranks 1 and 2")
    }


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
def test_every_two_ranks_meet_once(size):
    met = []
    for partners in collectives.rounds(size):
        assert all(partners[partner] == rank != partner for rank, partner in partners.items())
        met += [(rank, partner) for rank, partner in partners.items() if rank < partner]
    assert sorted(met) == list(combinations(range(size), 2))


def test_a_layout_is_judged_by_its_worst_rank():
    exact = parity.Numbers([], [torch.tensor([-1.0, -2.0])], 1.5, 4.0)
    right = {"logprobs": [[0.0, -1.0, -2.0, 0.0]], "loss": 1.5, "grad_norm": 4.0}
    assert all(check.holds for check in layouts.judge("x", exact, [right, right]))
    wrong = {"logprobs": [[0.0, -1.0, -2.1]], "loss": 1.6, "grad_norm": 4.1}
    checks = layouts.judge("x", exact, [right, wrong])
    assert [check.holds for check in checks] == [False] * 3
    assert [check.value for check in checks] == pytest.approx([0.1, 0.1, 0.025], rel=1e-3)


def test_a_rank_that_fails_is_named_with_its_log(tmp_path):
    assert ranks.run(1, "ranks.machine", tmp_path / "good", {}) == ["0"]
    with pytest.raises(process.Ended, match="no_such_function") as failed:
        ranks.run(1, "ranks.no_such_function", tmp_path / "bad", {})
    assert "Traceback" in failed.value.log


def test_a_slow_learner_fails():
    good = speed.Speeds(1.0, 3.3, 4e14, 8e14, 32768)
    assert all(check.holds for check in speed.judge(good, good._replace(update_s=3.4)))
    slow = good._replace(score_s=2.0, update_s=9.0)
    assert [check.name for check in speed.judge(slow, good) if not check.holds] == [
        "of the product's speed, score",
        "of the product's speed, update",
        "an update over a score",
        "without the fused activation over with it",
    ]


def test_reports_of_several_machines_become_one(tmp_path, monkeypatch):
    def report(host, **answers):
        rows = [
            judge(name, ROW, answer, 1).model_copy(update={"host": host})
            for name, answer in answers.items()
        ]
        passed = all(row.status != "fail" for row in rows)
        return Report(passed=passed, quick=True, machine={"hosts": [host]}, rows=rows)

    good, none = Answer(checks=[at_most("a", 1, 2)]), Answer(not_here="no GPU")
    first, second = report("n1", parity=good, waits=none), report("n2", parity="died", waits=none)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "private").mkdir()
    monkeypatch.setenv("RANK", "1")
    assert ranks.merge(tmp_path, second) is None
    monkeypatch.setenv("RANK", "0")
    whole = ranks.merge(tmp_path, first)
    assert not whole.passed
    assert whole.machine["hosts"] == ["n1", "n2"]
    assert [(row.host, row.name) for row in whole.shown] == [
        *(("n1", "parity"), ("n1", "waits"), ("n2", "parity"))
    ]
    said = "1 pass, 1 fail, 2 not here; failed: parity on n2"
    assert outcome.read(tmp_path) == outcome.Outcome("failed", said)
    assert first.summary == "1 pass, 1 not here"


def test_options_of_a_job_want_nodes():
    for option in (["--dry-run"], ["--recipe", "x.yaml"], ["--set", "slurm.time=1:00"]):
        fp16rl("selftest", *option, code=2)


def test_functions_that_may_wait_exist_and_one_wait_more_fails():
    """How waits are counted: tests/ranks/test_selftest.py."""
    for site in waits.EXPECTED:
        file, name = site.split(":")
        tree = ast.parse((ROOT / "megatron_fp16rl" / file).read_text())
        assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, site
    assert all(check.holds for check in waits.judge(dict(waits.EXPECTED)))
    more = {**waits.EXPECTED, "learner/nonfinite.py:inspect": 4}
    failed = [check.name for check in waits.judge(more) if not check.holds]
    assert failed == ["of all functions", "learner/nonfinite.py:inspect"]


def test_tiny_sequences_have_no_padding_token():
    assert all(min(ids) > 0 for ids in random_tokens())
