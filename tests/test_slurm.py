"""Batch scripts: what they ask for, that bash and shellcheck and a real Slurm take them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from megatron_fp16rl import tasks
from megatron_fp16rl.evaluation import suites
from megatron_fp16rl.recipe import RecipeError, load
from tests.conftest import ROOT, python

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
MATH = ROOT / "recipes/tiny/smollm2-math-fp16.yaml"
LARGE = ROOT / "recipes/dense/qwen3-8b-dapo-fp16-2n8g.yaml"
PROBLEMS = ["--set=task.path=recipes/tiny/data/math.jsonl"]
GPUS = "slurm={learner_nodes: 2, rollout_nodes: 2, gpus_per_node: 8, partition: main, time: '10'}"
CPUS = "slurm={learner_nodes: 2, gpus_per_node: 0, time: '10'}"
VARIANTS = {
    "gpus": [GPUS, "rollout.servers=2"],
    "cpus": [CPUS],
    "everything": [
        GPUS,
        "rollout.servers=4",
        "slurm.rollout_partition=low",
        "slurm.gres=gpu:8",
        "slurm.interface=ib0",
        "slurm.comment='two words; $(and more)'",
        "slurm.modules=[cuda/13]",
        "slurm.setup=[ulimit -n 65536]",
        "slurm.environment={NCCL_DEBUG: WARN, ODD: 'a b'}",
        "slurm.container={image: 'docker://x/y:z', mounts: ['/data:/data']}",
    ],
    "apptainer": [CPUS, "slurm.container={image: /images/rl.sif, runtime: apptainer}"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scripts_are_good_bash(variant, tmp_path):
    script = slurm.write_job(load(RECIPE, VARIANTS[variant]), tmp_path)
    checker = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [checker, "--shell=bash", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.stdout + found.stderr == ""
    assert load(tmp_path / "recipe.yaml").slurm.learner_nodes == 2


@pytest.mark.parametrize("variant", ["gpus", "cpus", "everything"])
def test_a_real_slurm_takes_them(variant, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    script = slurm.write_job(load(RECIPE, VARIANTS[variant]), tmp_path)
    assert "to start at" in slurm.check(script)


def test_what_is_asked_of_slurm(tmp_path):
    def asked(*settings, chain=False):
        text = slurm.render(load(RECIPE, settings), tmp_path, chain)
        return [line for line in text.splitlines() if line.startswith("#SBATCH")]

    plain = asked(GPUS, "rollout.servers=2", chain=True)
    for option in ("nodes=4", "gpus-per-node=8", "exclusive", "requeue", "signal=B:USR1@300"):
        assert f"#SBATCH --{option}" in plain
    assert "#SBATCH --dependency=singleton" in plain
    several = asked(
        GPUS, "slurm.rollout_partition=low", "slurm.gres=gpu:h100:8", "slurm.options={switches: 1}"
    )
    assert several.count("#SBATCH --nodes=2") == 2
    assert several.count("#SBATCH --gres=gpu:h100:8") == 2
    assert several.index("#SBATCH hetjob") < several.index("#SBATCH --partition=low")
    assert "#SBATCH --switches=1" in several
    assert not any("gpus-per-node" in line for line in [*several, *asked(CPUS)])
    assert "#SBATCH --ntasks-per-node=2" in asked(CPUS)  # a rank and, on one of them, a server
    assert "#SBATCH --ntasks-per-node=1" in asked(CPUS, "slurm.rollout_nodes=1")
    assert not any("ntasks" in line for line in several)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["slurm={learner_nodes: 3}"],
            r"learner_nodes=3 does not divide learner.ranks=2; nearest: 1, 2",
        ),
        (["slurm={gpus_per_node: 2}"], r"are 2 GPUs, but 3 are needed .* 2 nodes would do"),
        (["slurm={rollout_partition: low}"], "needs slurm.rollout_nodes"),
        (["slurm={time: soon}"], "slurm.time"),
        (["slurm={tme: 1}"], "did you mean 'time'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_queue(settings, message):
    with pytest.raises(RecipeError, match=message):
        load(RECIPE, settings)


def test_what_does_not_fit_is_not_submitted(tmp_path):
    def submit(*arguments):
        asked = [f"--set=trainer.run_root={tmp_path}", "--dry-run", "--json", *PROBLEMS, *arguments]
        command = ["-m", "megatron_fp16rl.cli", "submit", LARGE, *asked]
        nowhere = {"PATH": str(tmp_path / "no-slurm")}  # the script is only written
        return python(*command, environment=nowhere, check=False)

    fits = submit()
    assert fits.returncode == 0, fits.stderr
    assert "qwen3-8b-dapo-fp16-2n8g fits: " in json.loads(fits.stdout)["plan"][-1]
    before = sorted(tmp_path.iterdir())
    refused = submit("--set=learner.micro_batch_tokens=200000")
    assert refused.returncode == 1
    assert re.search(
        r"does not fit: .* stage 0 needs \d+\.\d GiB of 76\.1.*--force", refused.stderr, re.S
    )
    assert sorted(tmp_path.iterdir()) == before  # nothing was left behind
    assert submit("--set=learner.micro_batch_tokens=200000", "--force").returncode == 0


def test_a_dry_run_writes_and_checks_and_submits_nothing(cluster, tmp_path):
    def submit(*arguments, check=True):
        command = ["-m", "megatron_fp16rl.cli", "submit", RECIPE, *arguments]
        command += ["--set", f"trainer.run_root={tmp_path}", "--json", "--dry-run"]
        return python(*command, environment=cluster.environment, check=check)

    answer = json.loads(submit("--set", CPUS).stdout)
    assert answer["jobs"] == []
    assert "to start at" in answer["check"]
    script = Path(answer["script"])
    assert script.parent == tmp_path / "tiny-dense-grpo-fp16"
    assert cluster.run("squeue", "-h") == ""
    refused = submit("--set", CPUS, "--set", "slurm.partition=none-such", check=False)
    assert refused.returncode == 1
    assert "invalid partition" in refused.stderr.lower()
    assert submit(check=False).returncode == 2


def test_paths_lead_where_they_led_when_the_run_was_written(tmp_path, monkeypatch):
    here, elsewhere, run = (tmp_path / name for name in ("here", "elsewhere", "run"))
    for folder in (here, elsewhere, run):
        folder.mkdir()
    monkeypatch.chdir(here)
    row = '{"problem": "1+1", "answer": "2"}\n'
    for name in ("train.jsonl", "suite.jsonl"):
        Path(name).write_text(row * 10)
    Path("rewards.py").write_text("def score(prompt, response, answer):\n    return 1.0\n")
    Path("models/own").mkdir(parents=True)
    Path("models/own/config.json").write_text("{}")
    Path("Qwen/Qwen3-8B").mkdir(parents=True)  # empty: the name is the hub's
    settings = [
        CPUS,
        "task.path=train.jsonl",
        "task.reward={kind: function, path: 'rewards.py:score'}",
        "trainer.suites=[{suite: 'suite.jsonl:avg@4'}, {suite: 'held-out:greedy'}]",
        "rollout.replay=rollouts",
    ]
    for given, wanted in (
        ("models/own", str(here / "models/own")),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
    ):
        script = slurm.write_job(load(MATH, [*settings, f"model.path={given}"]), run)
        monkeypatch.chdir(elsewhere)
        recipe = load(run / "recipe.yaml")
        tasks.check(recipe.task)  # reads the problems, and calls the function
        suite, held_out = (suites.parse(asked.suite) for asked in recipe.trainer.suites)
        tasks.check(suites.task_of(suite, recipe))
        assert (suite.label, held_out.source) == ("avg@4", "held-out")
        assert recipe.rollout.replay == str(here / "rollouts")
        assert recipe.model.path == wanted
        assert f"\ncd {here}\n" in script.read_text()  # options of the engines may be paths too
        # Written again, as when the run goes on, nothing changes.
        before = (run / "recipe.yaml").read_text()
        slurm.write_job(recipe, run)
        assert (run / "recipe.yaml").read_text() == before
        monkeypatch.chdir(here)
