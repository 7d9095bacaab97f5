"""Benchmarks: what they do is checked, how fast they are is not."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import slurm
from launch.command import Job, submit
from megatron_fp16rl.cli import app
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools.bench import collectives, ranks, rollout, settings, step, sync
from tests.conftest import ROOT, python, run_ranks

TINY = ("--layers", 2, "--hidden", 128, "--json")
WORLD = 3


def command(*arguments):
    return [sys.executable, "-m", "megatron_fp16rl.cli", *map(str, arguments)]


def refused(*arguments):
    answer = CliRunner().invoke(app, list(map(str, arguments)))
    assert answer.exit_code == 2, answer.output
    return answer.stderr


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["collectives", "sync", "rollout", "learner", "step"])
def test_every_benchmark_explains_itself_with_an_example(name):
    help_text = CliRunner().invoke(app, ["bench", name, "--help"]).output
    assert "Example" in help_text
    assert f"fp16rl bench {name}" in help_text
    assert "--json" in help_text


# By operation: what rank `me` must hold, written as numbers; each rank has 2 elements of 6.
PAYLOADS = {
    "all_reduce": lambda me: [1, 2, 3, 4, 5, 1],
    "reduce_scatter": lambda me: [[1, 2], [3, 4], [5, 1]][me],
    "all_gather": lambda me: [0, 1, 1, 2, 2, 3],
    "all_to_all": lambda me: [16 * me + n for n in (0, 1, 1, 2, 2, 3)],
    "broadcast": lambda me: [0, 1, 2, 3, 4, 5],
    "send_recv": lambda me: [(me - 1) % WORLD + n for n in range(6)],
}


def test_payloads_are_right_and_wrong_ones_are_seen():
    found = run_ranks(WORLD, "collectives.collective_payloads", size=12)
    for me, rank in enumerate(found):
        assert set(rank["results"]) == {f"{o} {d}" for o in PAYLOADS for d in ("fp16", "bf16")}
        for case, numbers in rank["results"].items():
            assert numbers == PAYLOADS[case.split()[0]](me), case
        assert f"gave rank {me} (" in rank["complaint"]
        assert "the number 1.0 at 1, not 2.0" in rank["complaint"]


def test_bandwidths_are_those_of_nccl_tests():
    case = collectives.Case("data", "all_reduce", "fp16", 4, 8_000_000)
    seconds = [[0.004, 0.002, 0.008]] * 3 + [[0.003, 0.010, 0.030]]  # slowest: 0.004, 0.010, 0.030
    row = collectives.row(case, seconds, ["a", "b", "c", "d"])
    assert row["latency_us"] == pytest.approx(10_000)
    assert (row["latency_us_low"], row["latency_us_high"]) == pytest.approx((4_000, 30_000))
    assert row["algorithm_gb_per_s"] == pytest.approx(0.8)
    assert row["bus_gb_per_s"] == pytest.approx(0.8 * 2 * 3 / 4)
    assert row["slow_ranks"] == ["d"]  # 0.010 at the median, the others 0.004
    factors = {name: factor(4) for name, factor in collectives.BUS_FACTORS.items()}
    assert factors == {
        **dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), 0.75),
        **dict.fromkeys(("broadcast", "send_recv"), 1.0),
        "all_reduce": 1.5,
    }
    assert collectives.sizes(1024, 20_000, 4) == [1024, 4096, 16384]
    pairs = [
        {"nodes": list(pair), "gb_per_s": 0.1 if "d" in pair else 2.0}
        for pair in ("ab", "ac", "ad", "bc", "bd", "cd")
    ]
    connection, rank = collectives.outliers([row], pairs)
    assert connection.startswith("d is slow with 3 of 3")
    assert rank.startswith("d takes more than 2 times as long")


def test_fractions_are_of_what_was_measured_in_the_same_turn():
    row = sync.row([(1.0, 2.0, 10**9), (3.0, 4.0, 10**9), (1.0, 8.0, 10**9)])
    assert row["seconds"] == 4.0
    assert row["gb_per_s"] == 0.25
    assert row["fraction_of_broadcast"] == 0.5  # of 0.5, 0.75, 0.125
    assert (row["seconds_low"], row["seconds_high"]) == (2.0, 8.0)
    row = rollout.row([(90.0, 100.0), (80.0, 160.0), (50.0, 50.0)])
    assert row["tokens_per_s"] == 80.0
    assert row["fraction_of_raw_server"] == 0.9
    ways = sync.Ways(("distributed", "disk"), (16, 64))
    assert ways.all() == [("distributed", 16), ("distributed", 64), ("disk", None)]


def test_steps_of_a_run_that_there_is(tmp_path):
    def metrics(number, rollout_s, update_s, beside=0.0):
        parts = {"time/rollout_s": rollout_s, "time/score_s": 0.5, "time/update_s": update_s}
        whole = rollout_s + 0.5 + update_s + 0.5 + beside
        more = {"time/step_s": whole, "time/eval_s": beside, "tokens/step": 800}
        return json.dumps({"step": number, **parts, **more}) + "\n"

    recipe = load(ROOT / "recipes/tiny/dense-grpo-fp16.yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    # The last update was skipped, so it has no sync; and an evaluation that is no part of the step.
    rows = [metrics(0, 99, 99), metrics(1, 2, 1), metrics(2, 1, 1), metrics(3, 3, 4, beside=50)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    arguments = ["bench", "step", "--run", str(tmp_path), "--json"]
    result = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert (result["steps"], result["ranks"]) == (3, 2)
    assert (result["step_s"], result["step_s_low"], result["step_s_high"]) == (4, 3, 8)
    assert result["tokens_per_s"] == 200
    assert result["tokens_per_s_per_rank"] == 100
    shares = {row["part"]: row["share"] for row in result["rows"]}
    expected = {"rollout": 0.4, "score": 0.1, "update": 0.4, "sync": 0.0, "other": 0.1}
    assert shares == pytest.approx(expected)
    assert "has 4 step(s), of which 4" in refused(*arguments, "--warm-up", 4)
    assert "holds no metrics.jsonl" in refused("bench", "step", "--run", tmp_path / "none")


def test_what_runs_for_a_benchmark_of_steps_is_no_more_than_the_steps():
    recipe = load(ROOT / "recipes/tiny/dense-grpo-fp16.yaml")
    asked = step.for_steps(recipe, 7)
    assert asked.trainer.steps == asked.trainer.eval_every == asked.checkpoint.every == 7
    assert asked.gates == []
    assert asked.rollout == recipe.rollout


def test_who_has_launched_a_process():
    assert ranks.launched({}) is None
    assert ranks.launched({"SLURM_STEP_NUM_TASKS": "1"}) is None  # a job's one task starts its own
    assert ranks.launched({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}) == 4
    assert ranks.launched({"RANK": "0", "WORLD_SIZE": "1"}) == 1
    assert ranks.launched({"OMPI_COMM_WORLD_SIZE": "2"}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collectives", "--dtypes", "fp8"], "no 'fp8'; there are fp16, bf16, fp32"),
        (["sync", "--buckets", "0"], "--buckets 0: write whole numbers"),
        (["sync", "--nodes", 2], "starts servers on one node"),
        (["rollout", "--concurrency", "many"], "--concurrency many: write"),
        (["learner", "--ranks", 2, "--layout", "tensor_paralel=2"], "did you mean 'tensor_par"),
        (["learner", "--ranks", 2, "--sequences", 3], "3 is not a multiple of the 2 data-parallel"),
        (["learner", "--ranks", 8, "--nodes", 3], "slurm.learner_nodes=3 does not divide"),
        (["collectives", "--ranks", 18, "--nodes", 2], "gpus_per_node"),
        (["step", "--run", "x", "--nodes", 1], "--run measures a run that there is"),
    ],
)
def test_bad_usage_is_refused_before_anything_starts(arguments, message):
    assert message in refused("bench", *arguments)


def test_learner_at_two_layouts():
    done = python(
        *command("bench", "learner", *TINY, "--ranks", 2, "--sequences", 4, "--tokens", 16)[1:],
        *("--repeats", 2, "--layout", "tensor_parallel=2", "--layout", ""),
    )
    result = json.loads(done.stdout)
    assert result["hosts"] == result["hosts"][:1] * 2
    assert [(row["layout"], row["dtype"]) for row in result["rows"]] == [
        *product(["2 ranks, tensor_parallel=2", "2 ranks"], ["fp32", "fp16"])
    ]
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(4 * 16 / row["seconds"])
        assert row["tokens_per_s_per_rank"] == pytest.approx(row["tokens_per_s"] / 2)
        assert len(row["repeats_s"]) == 2
        assert row["grad_norm"] == pytest.approx(result["rows"][0]["grad_norm"], rel=1e-3)
    assert result["grad_norm_difference"] < 1e-3
    fp32, fp16 = (row["repeats_s"] for row in result["rows"][:2])
    assert result["fp16_over_fp32"] == pytest.approx(
        sum(a / b for a, b in zip(fp32, fp16, strict=True)) / 2
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Results of the benchmarks that start servers, which two do at the same time."""
    folder = tmp_path_factory.mktemp("served")
    asked = {
        "sync": ("--repeats", 1, "--buckets", "1,64"),
        "rollout": ("--repeats", 1, "--concurrency", "1,16", "--set", "rollout.max_new_tokens=4"),
    }
    with ExitStack() as stack:
        running = {}
        for name, options in asked.items():
            files = [
                stack.enter_context((folder / f"{name}.{s}").open("w+")) for s in ("out", "err")
            ]
            line = command("bench", name, *TINY, *options, "--out", folder / f"{name}.json")
            running[name] = subprocess.Popen(line, cwd=ROOT, stdout=files[0], stderr=files[1])
            stack.callback(running[name].kill)
        for name, process in running.items():
            assert process.wait(240) == 0, (folder / f"{name}.err").read_text()
    for name in asked:  # exactly one object on stdout, the same as in the file
        printed = json.loads((folder / f"{name}.out").read_text())
        assert printed == json.loads((folder / f"{name}.json").read_text())
        assert printed["benchmark"] == name
        assert set(printed) > {"platform", "versions", "hosts", "threads", "when"}
        running[name] = printed
    return running


def test_sync_to_a_real_server(served):
    rows = served["sync"]["rows"]
    assert [(row["transport"], row["bucket_mib"]) for row in rows] == [
        ("distributed", 1),
        ("distributed", 64),
        ("disk", None),
    ]
    model = settings.recipe(None, [], layers=2, hidden=128).model
    vocabulary, config = len(model.build.alphabet) + 2, model.build.config
    assert (vocabulary, config["num_hidden_layers"]) == (1024, 2)
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 2 * 128 + 2 * 32
    size = 2 * (2 * vocabulary * 128 + 2 * layer + 128)  # fp16
    assert [row["bytes"] for row in rows[:2]] == [size] * 2
    assert size < rows[2]["bytes"] < 1.1 * size  # with safetensors' header
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["fraction_of_broadcast"] == pytest.approx(
            row["broadcast_seconds"] / row["seconds"]
        )


def test_rollouts_of_a_real_server(served):
    rows = served["rollout"]["rows"]
    assert [row["concurrency"] for row in rows] == [1, 16]
    for row in rows:
        assert row["fraction_of_raw_server"] == pytest.approx(
            row["tokens_per_s"] / row["raw_tokens_per_s"]
        )


def test_collectives_as_a_job_on_four_nodes(cluster, tmp_path):
    tmp_path.chmod(0o755)
    kinds, dtypes, (small, large) = "world,tensor,pipeline,data", ("fp16", "fp32"), (1024, 65536)
    line = command(
        *("bench", "collectives", "--nodes", 4, "--ranks", 4, "--set", "learner.tensor_parallel=2"),
        *("--set", "slurm={gpus_per_node: 0}", "--set", f"trainer.run_root={tmp_path}"),
        *("--groups", kinds, "--dtypes", ",".join(dtypes), "--repeats", 2, "--json"),
        *("--min-bytes", small, "--max-bytes", large, "--factor", 64),
    )
    job = json.loads(cluster.run("env", "-C", str(ROOT), *line, timeout=60))
    assert "to start at" in job["check"]
    state = cluster.wait_for(job["jobs"][0], "COMPLETED", "FAILED", timeout=180)
    assert state == "COMPLETED", Path(job["output"]).read_text()
    result = json.loads(Path(job["result"]).read_text())
    assert result["hosts"] == cluster.nodes
    assert result["layout"]["tensor"] == result["layout"]["data"] == 2
    cases = [
        (group, operation, dtype, size)
        for group in ("world", "tensor", "data")
        for operation in collectives.GROUPS[group]
        for dtype in dtypes
        for size in (small, large)
    ]
    assert [(r["group"], r["operation"], r["dtype"], r["bytes"]) for r in result["rows"]] == cases
    for row in result["rows"]:
        assert row["ranks"] == (4 if row["group"] == "world" else 2)
        algorithm = row["bytes"] / row["latency_us"] / 1e3
        assert row["algorithm_gb_per_s"] == pytest.approx(algorithm)
        factor = collectives.BUS_FACTORS[row["operation"]](row["ranks"])
        assert row["bus_gb_per_s"] == pytest.approx(algorithm * factor)
    assert result["pairs"]["count"] == 6
    assert result["left_out"] == [{"group": "pipeline", "reason": "of one rank: nothing is sent"}]


@pytest.mark.parametrize("template", ["bench.sbatch.j2", "eval.sbatch.j2"])
@pytest.mark.parametrize("devices", ["gpus_per_node: 8", "gpus_per_node: 0"])
def test_scripts_are_good_bash(template, devices, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "available", lambda: False)
    monkeypatch.setattr(
        sys, "argv", ["fp16rl", "bench", "learner", "--layout", "a=1,b=2; two words"]
    )
    setting = f"slurm={{learner_nodes: 2, {devices}, interface: ib0, setup: [ulimit -n 65536], modules: [cuda/13]}}"
    container = "slurm.container={image: 'docker://x/y:z', mounts: ['/data:/data']}"
    recipe = settings.recipe(None, [setting, container, f"trainer.run_root={tmp_path}"], 8)
    script = submit(Job(template, "job", 4, 8), recipe, dry_run=True)["script"]
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [checker, "--shell=bash", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout + done.stderr == ""
    text = Path(script).read_text()
    assert "--nodes=4 --ntasks=8 --ntasks-per-node=2" in text
    assert "'a=1,b=2; two words'" in text


def test_an_evaluation_as_a_job_goes_on_after_its_time_limit(cluster, tmp_path):
    tmp_path.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    tiny = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
    (run / "recipe.yaml").write_text(load(tiny).to_yaml())
    asked = ("eval", run, "--suite", "held-out:avg@2", "--submit", "--json")
    assert "there is no slurm: section" in refused(*asked)
    asks = [f"trainer.run_root={tmp_path}", "slurm={gpus_per_node: 0}"]
    (run / "recipe.yaml").write_text(load(tiny, asks).to_yaml())
    job = json.loads(python(*command(*asked)[1:], environment=cluster.environment).stdout)
    (number,) = job["jobs"]
    try:
        wait_for(lambda: f"{number}.0 " in cluster.run("squeue", "-h", "--steps"), 60, "its step")
        cluster.run("scancel", "--batch", "--signal=USR1", number)  # as Slurm does before the limit
        wait_for(lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", number), 60, "it")
    finally:
        cluster.run("scancel", number)
    assert "goes back into the queue" in Path(job["output"]).read_text()
    text = Path(job["script"]).read_text()
    assert f"megatron_fp16rl.cli eval {run} --suite held-out:avg@2 --submit" in text
