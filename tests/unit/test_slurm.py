"""Batch scripts: what they ask for, that bash and shellcheck and a real Slurm take them."""

import json
import math
import re
import string
import sys
from pathlib import Path

import pytest

from launch import batch_script, slurm
from launch.run_folder import absolute
from megatron_fp16rl.data import tasks
from megatron_fp16rl.data.tasks.dataset import task_of
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.tools.plan import submission
from megatron_fp16rl.utils.processes import answer
from tests.conftest import ROOT
from tests.runs import fp16rl
from tests.unit.test_scripts import program

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
MATH = ROOT / "recipes/tiny/smollm2-math-fp16.yaml"
GPUS = "slurm={learner_nodes: 2, rollout_nodes: 2, gpus_per_node: 8, options: {partition: main}, time: '10'}"
CPUS = "slurm={learner_nodes: 2, gpus_per_node: 0, time: '10'}"
VARIANTS = {
    "gpus": [GPUS, "rollout.servers=2"],
    "cpus": [CPUS],
    "everything": [
        GPUS,
        "rollout.servers=4",
        "slurm.gres=gpu:8",
        "slurm.interface=ib0",
        "slurm.options.comment='two words; $(and more)'",
        "slurm.modules=[cuda/13]",
        "slurm.setup=[ulimit -n 65536]",
        "slurm.environment={NCCL_DEBUG: WARN, ODD: 'a b'}",
        "slurm.container={image: 'docker://x/y:z', mounts: ['/data:/data']}",
    ],
    "apptainer": [CPUS, "slurm.container={image: /images/rl.sif, runtime: apptainer}"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scripts_are_good_bash(variant, tmp_path):
    script = batch_script.write(load(RECIPE, VARIANTS[variant]), tmp_path)
    checker = Path(sys.executable).parent / "shellcheck"
    checked = answer([checker, "--shell=bash", script], 60)
    assert checked.stdout + checked.stderr == ""
    assert load(tmp_path / "recipe.yaml").slurm.learner_nodes == 2


def test_a_container_sees_what_the_recipe_names_and_the_caches(tmp_path, monkeypatch):
    hub, kernels, data, models = (tmp_path / n for n in ("hub", "kernels", "data", "models"))
    for folder in (hub, data / "model", models):
        folder.mkdir(parents=True)
    (data / "model" / "config.json").write_text("{}")
    (data / "problems.jsonl").write_text("{}")
    monkeypatch.setenv("HF_HOME", str(hub))
    monkeypatch.setenv("HF_HUB_CACHE", str(models))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("FP16RL_CACHE", "/elsewhere")
    task = {"kind": "dataset", "path": str(data / "problems.jsonl")}
    settings = [
        *(GPUS, f"model={{build: null, path: '{data}/model'}}", f"task={json.dumps(task)}"),
        f"slurm.environment={{FP16RL_CACHE: {kernels}}}",
        "slurm.container={image: x, mounts: ['/scratch:/scratch']}",
    ]
    recipe = load(RECIPE, settings)
    text = batch_script.render(recipe, tmp_path / "run")
    wanted = [f"{p}:{p}" for p in (data, hub, kernels, models)]
    (mounts,) = set(re.findall(r"--container-mounts=(\S+?)'?(?:\s|$)", text))
    assert mounts.split(",")[2:] == ["/scratch:/scratch", *wanted]  # after the run and the project
    assert f"export HF_HOME={hub}" in text
    assert f"export HF_HUB_CACHE={models}" in text
    assert f"export FP16RL_CACHE={kernels}" in text
    assert kernels.is_dir()  # Pyxis mounts nothing that is not there
    # What a mount of the recipe's holds needs no other; one to elsewhere does not hold it where it is looked for.
    for target, is_held in ((tmp_path, True), ("/elsewhere", False)):
        mount = f"slurm.container={{image: x, mounts: ['{tmp_path}:{target}']}}"
        text = batch_script.render(load(RECIPE, [*settings[:-1], mount]), tmp_path / "run")
        assert (f"{hub}:{hub}" not in text) == is_held
    assert "export HF_HOME" not in batch_script.render(load(RECIPE, [GPUS]), tmp_path / "run")


@pytest.mark.parametrize("variant", ["gpus", "cpus", "everything"])
def test_a_real_slurm_takes_them(variant, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    script = batch_script.write(load(RECIPE, VARIANTS[variant]), tmp_path)
    assert "to start at" in slurm.check(script.read_text())


STAND_IN = f"""#!/bin/bash
if [ "$2" = launch.supervisor ]; then exec {sys.executable} "$@"; fi
if [ "$2" = launch.rank ]; then echo done >"$3/private/outcome"; fi
echo "$SLURM_PROCID on $SLURM_NODEID, $MINE, ${{RANK-untold}}, $SLURM_CPU_BIND_TYPE"
"""


def test_a_real_job_is_what_its_recipe_asks_whatever_the_shell_would_have(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    for name, value in (("EXPORT", "NONE"), ("PARTITION", "low"), ("ARRAY_INX", "0-3")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    program(tmp_path / "python", STAND_IN)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    printable = "".join(c for c in string.printable if c.isprintable())
    folder = tmp_path / printable.replace("/", "").replace("\\", "")
    folder.mkdir()
    changes = [
        *("rollout.servers=2", "learner.ranks=4", "rollout.prompts=16"),
        "slurm={learner_nodes: 2, gpus_per_node: 0, options: {partition: main}}",
        f"slurm.options.comment={json.dumps(printable)}",
        "slurm.setup=['export MINE=set RANK=7 SLURM_DISTRIBUTION=cyclic SLURM_WAIT=1']",
    ]
    script = batch_script.write(load(RECIPE, changes), folder)
    assert "to start at" in slurm.check(script.read_text())
    number = slurm.submit(script)
    cluster.wait_for(number, "COMPLETED")
    assert slurm.queue([number])[number].state == "COMPLETED"
    said = cluster.run("scontrol", "show", "job", number)
    assert f"Comment={printable}" in said
    assert "Partition=main" in said
    logs = folder / "logs" / "attempt_0"
    for kind, nodes in (("rank", (0, 0, 1, 1)), ("supervisor", (0, 1))):
        for rank, node in enumerate(nodes):
            said = (logs / f"{kind}_{rank}.log").read_text()
            assert said == f"{rank} on {node}, set, untold, none\n"
    assert not list(logs.glob("*_4294967295.log"))


def test_what_is_asked_of_slurm(tmp_path):
    """Numbers and switches as they are written."""

    def options(*settings, chain=False):
        text = batch_script.render(load(RECIPE, settings), tmp_path, chain)
        return {line for line in text.splitlines() if line.startswith(("#SBATCH", "export"))}

    gpus = options(GPUS, "rollout.servers=2", chain=True)
    wanted = ("nodes=4", "gpus-per-node=8", "exclusive", "requeue", "signal=B:USR1@300")
    assert gpus >= {f"#SBATCH --{option}" for option in (*wanted, "dependency=singleton")}
    several = options(GPUS, "slurm.gres=gpu:h100:8", "slurm.options={switches: 1}")
    assert several >= {"#SBATCH --gres=gpu:h100:8", "#SBATCH --switches=1"}
    assert not any("gpus-per-node" in line for line in several | options(CPUS))
    assert "#SBATCH --ntasks-per-node=2" in options(CPUS)  # a rank and, on one of them, a server
    assert "#SBATCH --ntasks-per-node=1" in options(CPUS, "slurm.rollout_nodes=1")
    assert not any("ntasks" in line for line in several)
    written = options(
        "slurm={gpus_per_node: 0, time: 1:0:0, environment: {NCCL_IB_DISABLE: 1, X: '0x10'}, "
        "options: {account: '012345', exclude: 7, mem: 0, exclusive: false}}"
    )
    asked = ("account=012345", "exclude=7", "mem=0", "time=1:0:0")
    assert written >= {f"#SBATCH --{option}" for option in asked}
    assert written >= {"export NCCL_IB_DISABLE=1", "export X=0x10"}
    assert not any("exclusive" in line for line in written)


# A setting, and what is said of it.
REFUSED = {
    "slurm={learner_nodes: 3}": r"learner_nodes=3 does not divide learner.ranks=2; nearest: 1, 2",
    "slurm={gpus_per_node: 2}": r"are 2 GPUs, but 3 are needed .* 2 nodes would do",
    "slurm={rollout_partition: low}": "one partition .* on slurm.rollout_nodes",
    "slurm={time: soon}": r"slurm.time = 'soon'.*DAYS-HOURS:MINUTES.*UNLIMITED",
    "slurm.account=me": r"slurm: account is an option .* slurm.options: {account: me}",
    "slurm.mail_user=me": r"slurm.options: {mail-user: me, mail-type: 'END,FAIL'}",
    "slurm={interface: ''}": r"slurm.interface = '': is empty; .* null",
    "slurm={time: '5'}": "is 300 s and slurm.warn_s=300",
    'slurm={interface: "two\\nlines"}': r"slurm.interface = .* write it on one line",
    'slurm={container: {image: a, mounts: ["a:b\\n"]}}': "slurm.container.mounts.0",
    "slurm={container: {image: a, mounts: ['/a:b']}}": "'/a:b' is no SOURCE:TARGET with absolute paths",
    "slurm={container: {image: $HOME/a.sqsh}}": "container.image = .* is taken literally, '\\$H' too",
    "slurm={time: ٣:00}": "is no time of Slurm's",
    "slurm={modules: [cuda openmpi]}": "modules.0 .* write a list of names",
    "slurm={setup: ['#SBATCH --mem=0']}": "slurm.options: {mem: 0}",
    'slurm={setup: ["echo \\a"]}': "bash cannot read",
    "slurm={environment: {MY-VAR: 1}}": "'MY-VAR' cannot be a variable",
    "slurm={environment: {UID: 1}}": "does not let UID be set",
    "slurm={environment: {MASTER_PORT: 29500}}": "its MASTER_PORT; remove it",
    "slurm={environment: {PATH: '/opt/x:$PATH'}}": "literally, '\\$P' too.*slurm.setup",
    "slurm={options: {nodes: 3}}": "nodes: fp16rl sets that.*slurm.learner_nodes",
    "slurm={options: {outp: my.log}}": "outp: fp16rl sets that.*logs/slurm.out",
    "slurm={options: {clusters: north}}": "SLURM_CLUSTERS, for submit",
    "slurm={options: {N: 3}}": "'N' is no option of sbatch by its long name",
    'slurm={options: {switches: "1\\n#SBATCH --wrap=id"}}': "write it on one line",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_fit_is_refused_before_the_queue(setting):
    with pytest.raises(RecipeError, match=REFUSED[setting]):
        load(RECIPE, [setting])


def test_times_are_slurms():
    times = {"90": 5400, "90:30": 5430, "1:0:0": 3600, "2-3": 183600, "2-03:04:05": 183845}
    for written, seconds in {**times, "infinite": math.inf, "0": math.inf}.items():
        recipe = load(RECIPE, [f"slurm={{gpus_per_node: 0, time: {written}}}"])
        assert recipe.slurm.seconds == seconds, written


def dry_run(root, *settings, more=(), code=0):
    words = [f"--set={setting}" for setting in (f"trainer.run_root={root}", *settings)]
    return fp16rl("submit", RECIPE, "--dry-run", "--json", *words, *more, code=code)


def test_what_does_not_fit_is_not_submitted(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "available", lambda: False)  # the script is only written
    fits = dry_run(tmp_path, *VARIANTS["gpus"])
    assert "tiny-dense-grpo-fp16 fits: " in json.loads(fits.stdout)["plan"][-1]
    before = sorted(tmp_path.iterdir())
    # What a plan refuses, and suggests, is test_plan's; it takes a minute.
    change = {"changes": {"learner.tensor_parallel": 2}}
    plan = {"warnings": [], "fits": False, "reasons": ["stage 0"], "suggestions": [change]}
    monkeypatch.setattr(submission, "plan_of", lambda recipe: plan)
    refused = dry_run(tmp_path, *VARIANTS["gpus"], code=1)
    message = r"does not fit: stage 0\nit would with: --set learner.tensor_parallel=2\n.*--force"
    assert re.search(message, refused.stderr)
    assert sorted(tmp_path.iterdir()) == before  # nothing was left behind
    dry_run(tmp_path, *VARIANTS["gpus"], more=["--force"])


def test_a_dry_run_writes_and_checks_and_submits_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    written = json.loads(dry_run(tmp_path, CPUS).stdout)
    assert written["jobs"] == []
    assert "to start at" in written["check"]
    assert Path(written["script"]).parent == tmp_path / "tiny-dense-grpo-fp16"
    assert cluster.run("squeue", "-h") == ""
    refused = dry_run(tmp_path, CPUS, "slurm.options.partition=none-such", code=1)
    assert "invalid partition" in refused.stderr.lower()
    dry_run(tmp_path, code=2)  # it has no slurm section


def test_what_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.yaml").write_text(f"base: {RECIPE}\n")
    words = ["submit", "here/a.yaml", f"--set={CPUS}", "--dry-run"]
    for setting, code, message in (
        ("slurm.setup=['echo \"']", 2, "slurm.setup: line 1"),
        ("slurm.container={image: x, mounts: ['/a,b:/c']}", 2, "'/a,b:/c' cannot be mounted"),
        ("trainer.run_root=here/a.yaml", 1, "run_root=here/a.yaml is a file, or in one"),
        ("trainer.run_root=here/a.yaml/b", 1, "run_root=here/a.yaml/b is a file, or in one"),
    ):
        done = fp16rl(*words, f"--set={setting}", code=code)
        assert done.stdout == ""
        assert message in done.stderr
        assert [path.name for path in tmp_path.rglob("*")] == ["here", "a.yaml"]


def test_code_of_ones_own_is_found_from_elsewhere_and_in_a_container(tmp_path, monkeypatch):
    for name in ("losses", "rollouts"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    own = ["rollout.function=rollouts/mine.py:f", "algorithm.loss=losses/mine.py:f"]
    recipe = load(RECIPE, [GPUS, *own, "slurm.container={image: x}"])
    script = batch_script.write(recipe, tmp_path / "run").read_text()
    for name in ("losses", "rollouts"):
        assert f"{tmp_path}/{name}/mine.py:f" in (tmp_path / "run/recipe.yaml").read_text()
        assert f"{tmp_path}/{name}:{tmp_path}/{name}" in script


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
    hub = absolute(load(MATH, [*settings, "model.path=Qwen/Qwen3-8B"]))
    assert hub.model.path == "Qwen/Qwen3-8B"
    script = batch_script.write(load(MATH, [*settings, "model.path=models/own"]), run)
    monkeypatch.chdir(elsewhere)
    recipe = load(run / "recipe.yaml")
    tasks.check(recipe.task)  # reads the problems, and calls the function
    suite, held_out = recipe.trainer.suites
    tasks.check(task_of(suite, recipe))
    assert (suite.label, held_out.source) == ("avg@4", "held-out")
    assert recipe.rollout.replay == str(here / "rollouts")
    assert recipe.model.path == str(here / "models/own")
    assert f"\ncd {here}\n" in script.read_text()  # options of the engines may be paths too
    # Written again, as when the run goes on, nothing changes.
    before = (run / "recipe.yaml").read_text()
    batch_script.write(recipe, run)
    assert (run / "recipe.yaml").read_text() == before
