"""fp16rl report: runs side by side, and a page that follows a run."""

import pytest

from launch import status as statuses
from megatron_fp16rl.tools.report import comparison
from tests.models import recipe
from tests.runs import fp16rl, run_folder

BF16 = {"dtype": "bf16"}


def write_run(folder, steps=3, **changes):
    rows = [
        {
            "step": step,
            "reward/mean": step / 10,
            "mismatch/logprob_abs_mean": 1e-4 * (step + 1),
            "fp16/loss_scale": 2.0 ** (15 + step % 2),
            "fp16/skipped_total": 1,
            "time/step_s": 2.0,
            **({"eval/accuracy": 0.25} if step == 1 else {}),
        }
        for step in range(steps)
    ]
    if changes.get("precision") == BF16:
        rows = [{k: v for k, v in row.items() if "fp16/" not in k} for row in rows]
    return run_folder(folder, *rows, recipe=recipe(**changes).to_yaml())


@pytest.fixture
def pair(tmp_path):
    secret = {"environment": {"TOKEN": "hush-hush"}}
    one = write_run(tmp_path / "one", slurm=secret)
    return one, write_run(tmp_path / "$two$", 50, precision=BF16, name="two")


def test_runs_are_set_side_by_side_with_the_keys_that_differ(pair, tmp_path):
    png = tmp_path / "pair.png"
    done = fp16rl("report", *pair, "--png", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "one-vs-$two$.html").read_text()
    for text in (done.output, page):
        assert "precision.dtype" in text
        assert "slurm.environment.TOKEN" in text
        assert "hush-hush" not in text
        assert "rollout.samples" not in text  # the same in both
    records = comparison.read(pair, print)
    differ = {key: values for key, *values in comparison.differences(records)}
    assert differ["precision.dtype"] == ["fp16", "bf16"]
    assert "name" not in differ
    fared = {what: values for what, *values in comparison.results(records)}
    assert fared == {
        "steps": ["3", "50"],
        "reward, last 20 steps": ["0.100", "3.950"],
        "held-out accuracy, last": ["0.250", "0.250"],
        "mean |log pi - log mu|": ["2.0e-04", "2.6e-03"],
        "loss scale, last": ["32,768", ""],
        "skipped updates": ["1", ""],
        "seconds a step": ["2.00", "2.00"],
    }


def test_runs_of_one_name_are_told_apart_and_a_lost_recipe_is_named(tmp_path):
    folders = [write_run(tmp_path / where / "run") for where in ("a", "b")]
    assert [r.name for r in comparison.read(folders, print)] == ["a/run", "b/run"]
    (folders[1] / "recipe.yaml").unlink()
    done = fp16rl("report", *folders, "--out", tmp_path / "x.html")
    assert f"{folders[1]}/recipe.yaml: left out" in done.output
    assert "(absent)" in (tmp_path / "x.html").read_text()


def test_of_several_runs_each_must_have_a_step(pair, tmp_path):
    (pair[1] / "metrics.jsonl").unlink()
    done = fp16rl("report", *pair, code=2)
    assert "$two$ holds no metrics.jsonl with a step" in done.output
    assert list(tmp_path.glob("*.html")) == []


def test_a_watched_page_reads_itself_again_until_the_run_is_over(pair, monkeypatch):
    run, refreshed = pair[0], []

    def follow(folders, _):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        states = (("running", 0), ("running", 1), ("running", 1), ("running", 2), ("done", 3))
        for state, steps in states:
            (run / "metrics.jsonl").write_text("".join(lines[:steps]))
            yield [statuses.Status("one", str(run), state=state, steps_done=steps)]
            page = run / "report.html"
            refreshed.append("http-equiv" in page.read_text() if page.exists() else None)
            page.unlink(missing_ok=True)

    monkeypatch.setattr(statuses, "follow", follow)
    done = fp16rl("report", run, "--watch")
    assert refreshed == [None, True, None, True, False]  # a step is drawn once
    assert done.output.splitlines()[-1] == "done"


def test_only_one_run_can_be_watched(pair, tmp_path):
    for folders in ([tmp_path / "nowhere"], pair):
        fp16rl("report", *folders, "--watch", code=2)
