"""Runs that are watched, stopped and cancelled: here, under MPI, and as jobs of a real Slurm."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from launch import lock, outcome, slurm, status
from megatron_fp16rl.learner import checkpoint_files
from megatron_fp16rl.utils.files import write_text
from tests.conftest import ROOT
from tests.runs import fp16rl, replay, steps_of, wait_for

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
STEPS = 400
MPI_STEPS = 3
ONE_NODE = "slurm={gpus_per_node: 0, time: '10'}"


def settings(*words):
    return [f"--set={word}" for word in words]


@pytest.fixture
def nodes(cluster, monkeypatch):
    """A real Slurm, to which commands of this process talk."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return cluster


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Settings of a run that learns from a recorded folder."""
    return replay(tmp_path_factory.mktemp("rollouts"), STEPS)


@pytest.fixture(scope="module")
def stopped(recorded, tmp_path_factory):
    """A run whose terminal went away, that was looked at, and asked to save and end; and what was seen."""
    root = tmp_path_factory.mktemp("local")
    folder, seen = root / "tiny-dense-grpo-fp16", {}
    given = settings(*recorded, f"trainer.run_root={root}")
    command = [sys.executable, "-m", "megatron_fp16rl.cli", "train", str(RECIPE), *given]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        launcher.stdout.readline()
        launcher.stdout.close()  # as `| head -n 1` does, and a lost ssh with the hangup
        wait_for(lambda: steps_of(folder), 120, "a step")
        launcher.send_signal(signal.SIGHUP)
        wait_for(lambda: len(steps_of(folder)) > MPI_STEPS + 2, 240, "some steps")
        (seen["running"],) = status.read([folder])
        seen["listening"] = {
            c.laddr.ip
            for process in psutil.Process(launcher.pid).children(recursive=True)
            for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
        seen["told"] = status.cancel(folder, save=True)
        launcher.wait(240)
    finally:
        launcher.kill()
    return folder, launcher, seen


def test_a_run_that_works_is_seen_to_work(stopped):
    _, launcher, seen = stopped
    running = seen["running"]
    assert running.state == "running"
    assert running.launcher.split()[1] == str(launcher.pid)
    assert 0 < running.steps_done <= running.steps == STEPS
    assert running.left_s > 0
    assert running.tokens_per_s > 0
    assert running.attempts == 1
    assert running.loss_scale == 2 ** round(math.log2(running.loss_scale))


def test_learner_ranks_listen_on_loopback_only(stopped):
    assert stopped[2]["listening"] == {"127.0.0.1"}


def test_a_run_that_is_asked_to_saves_and_ends(stopped):
    folder, launcher, seen = stopped
    assert seen["told"] == [f"SIGUSR1 to process {launcher.pid}, which runs {folder}"]
    assert launcher.returncode == 0
    run = json.loads(fp16rl("status", folder, "--json").stdout)
    steps = run["steps_done"]
    assert (run["state"], run["launcher"]) == ("stopped", None)
    assert steps == len(steps_of(folder)) < STEPS
    assert (folder / "checkpoints" / f"step_{steps}").is_dir()
    log = (folder / "logs" / "attempt_0" / "rank_0.log").read_text()
    assert f"step {steps}/{STEPS}" in log, "the log went on without the terminal"
    assert "nothing works on" in fp16rl("cancel", folder, code=1).stderr


def mpirun(*arguments):
    ranks = [Path(sys.executable).parent / "mpirun", "-n", "2", sys.executable]
    command = [*ranks, "-m", "megatron_fp16rl.cli.learner", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    return subprocess.run(command, cwd=ROOT, **options)


def test_mpirun_does_what_the_local_launcher_does_to_the_last_bit(stopped, recorded, tmp_path):
    given = settings(*recorded, f"trainer.steps={MPI_STEPS}", f"trainer.run_root={tmp_path}")
    done = mpirun(RECIPE, *given)
    folder = tmp_path / "tiny-dense-grpo-fp16"
    log = folder / "logs" / "attempt_0" / "rank_1.log"
    assert done.returncode == 0, done.stderr + log.read_text()
    assert f"run directory: {folder}" in done.stdout
    assert f"step {MPI_STEPS}/{MPI_STEPS}" in done.stdout
    assert outcome.read(folder).word == "done"

    def numbers(row):
        return {k: v for k, v in row.items() if not k.startswith("time/") and "eval" not in k}

    ours, theirs = steps_of(folder), steps_of(stopped[0])[:MPI_STEPS]
    assert [numbers(row) for row in ours] == [numbers(row) for row in theirs]
    assert len({row["grad/norm"] for row in ours}) == MPI_STEPS  # something was learnt
    assert status.read([folder])[0].state == "done"
    refused = mpirun(RECIPE, *given, "--set=learner.ranks=4")
    assert refused.returncode == 2
    assert "MPI started 2 processes, the recipe has learner.ranks=4" in refused.stderr


def submit(*arguments):
    return json.loads(fp16rl("submit", *arguments, "--json").stdout)


def test_a_sweep_is_a_job_for_each_run_with_its_own_recipe(nodes, tmp_path):
    # The scripts are real, but end before anything large starts.
    work = 'mkdir -p "$run/private"; cp "$run/recipe.yaml" "$run/ran"; echo done >"$run/private/outcome"; exit 0'
    given = settings(ONE_NODE, f"slurm.setup={json.dumps([work])}", f"trainer.run_root={tmp_path}")
    grid = [*given, "--sweep=learner.optimizer.lr=1e-6,3e-6", "--sweep=trainer.seed=0,1"]
    fp16rl("submit", RECIPE, *grid, "--sweep=trainer.steps=1,none", code=2)
    assert list(tmp_path.iterdir()) == []  # nothing is written before all is checked
    answer = submit(RECIPE, *grid, "--name=grid")
    folder = tmp_path / "grid"
    done = fp16rl("status", "grid", f"--root={tmp_path}", "--watch", "--json")
    states = {s["run"]: s["state"] for s in json.loads(done.stdout)["runs"]}
    points = {f"lr-{lr}-seed-{seed}": (lr, seed) for lr in ("1e-6", "3e-6") for seed in (0, 1)}
    assert states == dict.fromkeys(points, "done")
    for name, (lr, seed) in points.items():
        ran = yaml.safe_load((folder / name / "ran").read_text())
        assert float(ran["learner"]["optimizer"]["lr"]) == float(lr)
        assert ran["trainer"]["seed"] == seed
        assert (folder / name / "logs" / "slurm.out").exists()
    assert status.find(answer["jobs"][2], tmp_path) == folder / "lr-3e-6-seed-0"


def test_a_chain_is_followed_by_its_number_saved_and_cancelled(nodes, recorded, tmp_path):
    given = settings(*recorded, ONE_NODE, f"trainer.run_root={tmp_path}")
    first, second = submit(RECIPE, *given, "--chain=2")["jobs"]
    folder = tmp_path / "tiny-dense-grpo-fp16"
    root = f"--root={tmp_path}"
    wait_for(lambda: len(steps_of(folder)) > 2, 240, "the third step")
    seen = json.loads(fp16rl("status", first, root, "--json").stdout)
    assert (seen["state"], seen["folder"]) == ("running", str(folder))
    assert {n: job["state"] for n, job in seen["jobs"].items()} == {
        first: "RUNNING",
        second: "PENDING",
    }
    assert seen["jobs"][second]["reason"] == "Dependency"
    # Nobody else may work on it: the script of the job holds its lock, and is named.
    assert lock.holder(folder).job == first
    with pytest.raises(lock.RunInUse, match=f"in use by job {first}, on "), lock.alone_in(folder):
        pass
    lines = fp16rl("cancel", second, root, "--save").stdout
    assert lines.splitlines() == [f"job {second} is cancelled", f"job {first} is to save and end"]
    assert nodes.wait_for(first, "COMPLETED", "FAILED", "PENDING") == "COMPLETED"
    assert nodes.state_of(second) == "CANCELLED"
    seen = json.loads(fp16rl("status", first, root, "--json").stdout)
    assert (seen["state"], seen["jobs"]) == ("stopped", {})
    before, steps = steps_of(folder), seen["steps_done"] + 1
    assert (folder / "checkpoints" / f"step_{len(before)}").is_dir()
    # Put into the queue again, it goes on: one step more.
    (third,) = submit("--resume", folder, f"--set=trainer.steps={steps}")["jobs"]
    assert slurm.jobs(folder) == [first, second, third]
    done = fp16rl("status", third, root, "--watch", "--json")
    assert json.loads(done.stdout)["state"] == "done"
    assert steps_of(folder)[:-1] == before
    assert steps_of(folder)[-1]["step"] == steps - 1


def test_a_run_is_put_into_the_queue_again_only_if_it_can_go_on(nodes, tmp_path):
    given = settings("slurm={gpus_per_node: 0, options: {hold: true}}")
    (job,) = submit(RECIPE, *given, f"--set=trainer.run_root={tmp_path}")["jobs"]
    folder = tmp_path / "tiny-dense-grpo-fp16"
    before = {file: (folder / file).read_text() for file in ("recipe.yaml", "job.sbatch", "jobs")}

    def again(*arguments, run=folder, code=1):
        return fp16rl("submit", "--resume", run, *arguments, code=code).output

    said = again()
    assert f"job {job} (PENDING) has {folder} already" in said
    here = fp16rl("train", "--resume", folder, code=1)
    assert f"job {job} (PENDING) has {folder} already" in here.output
    assert f"fp16rl cancel {folder}" in said
    nodes.run("scancel", job)
    said = again()
    assert "holds no checkpoint" in said
    half = checkpoint_files.begin(folder / "checkpoints", 3)
    write_text(half / "state.json", "{}")
    checkpoint_files.commit(half, 3, {"state.json": checkpoint_files.digest(half / "state.json")})
    said = again("--set=slurm.options.partition=nowhere")
    assert "invalid partition specified: nowhere" in said
    said = again("--set=slurm.time=7", "--dry-run", "--json", code=0)
    script = Path(json.loads(said)["script"])
    assert "#SBATCH --time=7\n" in script.read_text()
    assert {file: (folder / file).read_text() for file in before} == before
    said = again("--set=slurm.time=7", "--json", code=0)
    (second,) = json.loads(said)["jobs"]
    assert "TimeLimit=00:07:00" in nodes.run("scontrol", "show", "job", second)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["slurm"]["time"] == "7"
    assert not script.exists()
    assert slurm.jobs(folder) == [job, second]
    nodes.run("scancel", second)
    said = again(run=tmp_path, code=2)
    assert "no run's directory" in said
