"""Other people's text on the terminal: no markup, no control characters, and nothing falls over it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from launch import local, slurm
from launch.status import Status
from megatron_fp16rl.cli import (
    app,
    bench,
    common,
    jobs,
    machine,
    plan,
    recipes,
    rehearse,
    runs,
    status_table,
)
from megatron_fp16rl.recipe import RecipeError, compare, load
from megatron_fp16rl.tools import doctor
from megatron_fp16rl.tools import recipes as shipped
from megatron_fp16rl.tools.bench import collectives
from megatron_fp16rl.tools.report import sanity as sanity_report
from megatron_fp16rl.tools.report import study as study_report
from megatron_fp16rl.utils.terminal import printable, progress_bars
from tests.conftest import ROOT

# Markup, also such that closes what was never opened; an emoji's code; escapes that clear the screen, name the
# window and colour what follows; a letter taken back; text that runs backwards; half a character.
HOSTILE = "[/b][red]w[/red]:smile:[/__w/x.cc:537]\x1b[2J\x1b]0;t\x07\b\x9b31m\u202eexe\ud800"
SHOWN = HOSTILE.encode("unicode_escape").decode()
TINY = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"


def test_controls_are_shown_and_all_else_is_left_alone():
    assert printable(HOSTILE) == SHOWN
    assert printable("over\rwritten\x0b") == "over\\rwritten\\x0b"
    plain = "é-ß [b] 日本 \U0001f600 a\tb\nc \\x1b"
    assert printable(plain) == plain


def status():
    row = Status("a", HOSTILE, "running", reason=HOSTILE, causes=[HOSTILE], last_error=HOSTILE)
    row.jobs["1"] = slurm.Job("PENDING", HOSTILE)
    common.console.print(status_table.of_one([row]))  # 5 times
    common.console.print(status_table.of_all([row]))
    jobs._watch([[row]], status_table.of_all)
    return 7


def summary():
    values = {
        "shares": {HOSTILE: 0.5},
        "mismatch_logprob_abs_mean": None,
        "accuracy_after": None,
        "wall_s": 1.0,
        "steps": 1,
        "skipped_total": 0,
        "gates_broken": [HOSTILE],
    }
    runs._print_summary(values, Path(HOSTILE), Path(HOSTILE))
    return 4


def errors():
    with pytest.raises(typer.Exit):
        common.fail(HOSTILE, 1)
    common.say(HOSTILE)
    common.show_job({"script": HOSTILE, "check": HOSTILE, "jobs": [1], "output": HOSTILE}, False)
    return 5


def listed():
    row = {"path": HOSTILE, "parameters_b": 1.0, "algorithm": "grpo", "nodes": None, "layout": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "listing", lambda: [{**row, "provenance": None}])
        recipes.list_recipes()
    return 1


def forked():
    def refuse(recipe, partial):
        raise RecipeError(HOSTILE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "fork", lambda *_: load(TINY))
        patch.setattr(recipes, "check_model", refuse)
        recipes.new_recipe(Path(HOSTILE), str(TINY))
    return 4


def differ():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "difference", lambda *_: {HOSTILE: (HOSTILE, HOSTILE)})
        recipes.diff_recipes(str(TINY), str(TINY))
    return 3


def planned():
    change = SimpleNamespace(changes={"a": HOSTILE}, nodes=1, step_s=1.0)
    found = SimpleNamespace(
        recipe=load(TINY),
        gpu=SimpleNamespace(name="h100", memory=2**30, memory_gib=1),
        learner=None,
        times=None,
        servers=SimpleNamespace(
            weights=1, kv_cache=1, kv_tokens=1, running=1, wanted=1, tensor_parallel=1
        ),
        admitted=([1], [1]),
        warnings=[HOSTILE],
        reasons=[HOSTILE],
        suggestions=[change],
        fits=False,
    )
    plan._show(found)
    return 3


def examined():
    finding = doctor.Finding(HOSTILE, HOSTILE, HOSTILE, needed=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "examine", lambda: [finding])
        with pytest.raises(typer.Exit):
            machine.doctor()
    return 3


def evaluated():
    row = {
        **dict.fromkeys(("suite", "metric"), HOSTILE),
        **dict.fromkeys(("value", "problems", "truncated_fraction", "length_mean"), 1.0),
        "low": None,
    }
    kept = {"problems": 1, "of": 1, "file": HOSTILE}
    runs._print_evaluation({"rows": [row], "perfectible": kept}, False)
    with progress_bars(common.console) as progress:
        progress.add_task(HOSTILE, total=1)  # cropped to its column
    return 3


def measured():
    row = {
        **dict.fromkeys(("group", "operation", "dtype"), HOSTILE),
        **dict.fromkeys(("ranks", "bytes"), 1),
        **dict.fromkeys(("latency_us", "latency_us_low", "latency_us_high"), 1.0),
        **dict.fromkeys(("algorithm_gb_per_s", "bus_gb_per_s"), 1.0),
        "slow_ranks": [],
    }
    result = {"ranks": 1, "backend": HOSTILE, "rows": [row], "faults": [HOSTILE]}
    bench.Options().show("collectives", collectives.VIEW, result)
    return 5


def studied():
    row = {"dtype": HOSTILE, "sequences": 1, "tokens": 1, **dict.fromkeys(study_report.COLUMNS, 1)}
    point = {"point": HOSTILE, "difference": 1.0, "served_error": 1.0, "learnt_error": 1.0}
    layers = {"first_jump": HOSTILE, "tokens": 1, "grows_most": [HOSTILE], "points": [point]}
    found = {"rows": [row], "bf16_over_fp16": None, "layers": {HOSTILE: layers}}
    for table in study_report.tables(found):
        common.console.print(table)
    return 5


def rehearsed():
    answer = {
        "proved": [{"what": HOSTILE, "figure": HOSTILE, "seconds": 1.0}],
        "folded": [{"what": HOSTILE, "full": HOSTILE, "here": HOSTILE}],
        "left_out": [HOSTILE],
        "only_gpus": [HOSTILE],
        "seconds": 1.0,
        "folder": HOSTILE,
    }
    rehearse._show(answer)
    return 8


def sanity():
    row = dict.fromkeys(
        ("reward_best", "reward_last", "accuracy_last", "steps_to_95", "mismatch_mean"), None
    )
    row |= dict.fromkeys(("mismatch_max", "skipped", "wall_s"), None)
    row |= {
        "algorithm": "grpo",
        "dtype": "fp16",
        "seed": 0,
        "collapsed": True,
        "reason": HOSTILE,
        "faults": [],
    }
    common.console.print(sanity_report.table([row]))
    return 1


OF_RECIPES = (listed, forked, differ, planned, rehearsed)
OF_RUNS = (status, summary, evaluated, measured, studied, sanity)


@pytest.mark.parametrize("show", [errors, examined, *OF_RECIPES, *OF_RUNS])
def test_what_commands_print_is_only_text(show, capsys, monkeypatch):
    monkeypatch.setattr(common.console, "_width", 2000)
    times = show()
    captured = capsys.readouterr()
    assert_only_text(captured.out + captured.err, times)


def assert_only_text(output: str, times: int) -> None:
    assert printable(output) == output, repr(output)
    # A table's cells may be broken over lines.
    flat = re.sub(r"[\s│┃]", "", output)
    assert flat.count(SHOWN) >= times, output


def test_train_prints_its_description_and_the_ranks_last_words_as_they_are(tmp_path, monkeypatch):
    """gloo's errors begin with a path in square brackets: the launcher says them, and goes on."""

    def run(recipe, folder, say):
        say(HOSTILE)
        raise local.RankDied(HOSTILE)

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(common.console, "_width", 2000)
    text = HOSTILE.replace("\ud800", "")  # which no recipe may hold
    settings = [f"description={json.dumps(text)}", f"trainer.run_root={tmp_path}/[red]"]
    result = CliRunner().invoke(
        app, ["train", str(TINY), *(part for each in settings for part in ("--set", each))]
    )
    assert result.exit_code == 1, result.output
    assert_only_text(result.output, 2)
    assert SHOWN.replace("\\ud800", "") in result.stdout.splitlines()[0]
    assert f"run directory: {tmp_path}/[red]/tiny-dense-grpo-fp16" in result.stdout
    assert f"error: {SHOWN}" in result.stderr


def test_what_rank_0_says_is_only_text_too(tmp_path, capsysbinary):
    line = HOSTILE.encode("utf-8", "surrogatepass") + b"\n"
    local._show([line, b"step 1 | reward 0.5\n"], tmp_path / "rank_0.log")
    shown = capsysbinary.readouterr().out.decode()
    assert printable(shown) == shown
    assert shown.startswith("[/b][red]w[/red]:smile:[/__w/x.cc:537]\\x1b[2J")
    assert shown.endswith("\nstep 1 | reward 0.5\n")
    assert (tmp_path / "rank_0.log").read_bytes().startswith(line)  # the log has it as it was


def test_what_a_plan_says_on_its_way_is_only_text_too(monkeypatch):
    def plan(recipe, gpu, say, mean_tokens):
        say(HOSTILE)
        raise RecipeError("no plan")

    monkeypatch.setattr("megatron_fp16rl.tools.plan.plan.plan", plan)
    result = CliRunner().invoke(app, ["plan", str(TINY)])
    assert (result.exit_code, result.stderr) == (2, "error: no plan\n"), result.exception


def test_no_command_writes_markup_of_its_own():
    """It would be printed as it is; styles are given by style=, or in a Text."""
    for path in (ROOT / "megatron_fp16rl/cli").glob("*.py"):
        assert not re.search(r"\[/\w*\]", path.read_text()), path


@pytest.mark.parametrize("argument", ["[/b]", "[red]", "[/__w/x.cc:537]"])
def test_arguments_are_no_markup_either(argument):
    for command in (
        ["train", argument],
        ["status", argument, "--root", argument],
        ["eval", argument, "--suite", argument],
        ["plan", str(TINY), "--gpu", argument],
        ["recipes", "diff", argument, argument],
        [argument],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.output
        assert argument in re.sub(r"[\s│]", "", result.output), command
