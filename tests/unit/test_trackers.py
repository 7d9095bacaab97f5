"""Trackers: what was logged is read back; a resumed run goes on there; one that fails touches nothing."""

import importlib.util
import json
import struct
import threading
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fp16rl.metrics import trackers
from megatron_fp16rl.metrics.run import Run
from tests.conftest import skip
from tests.models import recipe

RANK0 = SimpleNamespace(is_rank0=True)
LOGGED = {"reward/mean": 0.5, "fp16/loss_scale": 65536.0, "eval/aime/avg@32": 0.25}


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def needs(tracker):
    if importlib.util.find_spec(tracker) is None:
        skip(f"the extra {tracker} is not installed")


def make_steps(folder, tracker, first, last, **changes):
    """A run, or one that goes on after `first` steps."""
    with Run(recipe(trackers=[tracker]), folder, RANK0) as run:
        run.resume(first, 0)
        for step in run.steps(first):
            if step < last:
                run.record({**LOGGED, "reward/mean": step + 0.5, "fp16/overflow_source": None})
                run.record({**changes, "time/score_s": 0.1})
                run.finish(step)


def tensorboard_steps(folder):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [{"step": e.step, "reward/mean": e.value} for e in events.Scalars("reward/mean")]


def mlflow_run(folder):
    from mlflow import MlflowClient

    run_id = json.loads((folder / "trackers/mlflow.json").read_text())["id"]
    client = MlflowClient((folder / "trackers/mlflow").as_uri())
    return client, client.get_run(run_id)


def mlflow_steps(folder):
    client, run = mlflow_run(folder)
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    return [{"step": m.step, "reward/mean": m.value} for m in history]


def wandb_records(file):
    """W&B's files are LevelDB's log behind 7 bytes: blocks of 32 KiB; CRC, length and type of each part."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def wandb_steps(folder):
    """Of all attempts, in their order; all of one run."""
    rows, ids = [], set()
    files = (folder / "trackers").rglob("*.wandb")
    for file in sorted(files, key=lambda file: file.parent.name):
        for record in wandb_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                rows.append({"step": values["_step"], **values})
    assert ids == {json.loads((folder / "trackers/wandb.json").read_text())["id"]}
    return rows


READ = {"tensorboard": tensorboard_steps, "wandb": wandb_steps, "mlflow": mlflow_steps}


@pytest.mark.parametrize("tracker", READ)
def test_what_was_logged_is_read_back_and_a_resumed_run_goes_on_there(tracker, tmp_path, capsys):
    needs(tracker)
    make_steps(tmp_path, tracker, 0, 2)
    make_steps(tmp_path, tracker, 1, 3)  # step 1 is made again
    rows = READ[tracker](tmp_path)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    said = capsys.readouterr().out
    assert "FAILED" not in said
    assert ("has steps 2 to 2 from before" in said) == (tracker != "tensorboard")
    if tracker == "wandb":
        assert {name: rows[2][name] for name in LOGGED} == {**LOGGED, "reward/mean": 2.5}
        assert "fp16/overflow_source" not in rows[2]
    if tracker == "mlflow":
        _, run = mlflow_run(tmp_path)
        assert run.data.metrics["eval/aime/avg_32"] == 0.25
        assert run.data.params["rollout.samples"] == "4"
        assert run.info.status == "FINISHED"


@pytest.mark.parametrize("tracker", READ)
def test_one_that_fails_is_named_once_and_gets_the_rest_when_the_run_goes_on(
    tracker, tmp_path, capsys, monkeypatch
):
    needs(tracker)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(trackers.TRACKERS[tracker], "log", full)
        make_steps(tmp_path, tracker, 0, 2)
    said = capsys.readouterr().out
    assert said.count(f"WARNING: tracker {tracker} FAILED and gets no more: OSError: no space") == 1
    assert [line.split()[1] for line in said.splitlines() if "step " in line] == ["1/3", "2/3"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    make_steps(tmp_path, tracker, 2, 3)
    steps = [row["step"] for row in READ[tracker](tmp_path)]
    assert steps == ([2] if tracker == "tensorboard" else [0, 1, 2])


def test_one_that_hangs_holds_up_no_step_and_the_end_not_for_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT_S", 0.5)
    hung = threading.Event()
    monkeypatch.setattr(trackers.TensorBoard, "log", lambda *_: hung.wait())
    make_steps(tmp_path, "tensorboard", 0, 3)
    assert "tensorboard FAILED and gets no more: it has not taken" in capsys.readouterr().out
    hung.set()


def test_a_package_that_is_not_here_is_named_with_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers.WandB, "module", "no_such_package")
    make_steps(tmp_path, "wandb", 0, 1)
    said = capsys.readouterr().out
    assert "No module named 'no_such_package'; pip install -e '.[wandb]'" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_other_ranks_have_no_trackers(tmp_path):
    with Run(recipe(), tmp_path, SimpleNamespace(is_rank0=False)) as run:
        run.resume(0, 0)
        run.finish(0)
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_offline_without_a_key_or_a_server_that_answers(monkeypatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert trackers.WandB._mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert trackers.WandB._mode() == "offline"


def test_secrets_of_the_job_are_in_no_tracker():
    secret = {"environment": {"WANDB_API_KEY": "abc"}}
    assert recipe(slurm=secret).shown()["slurm.environment.WANDB_API_KEY"] == "(not shown)"
