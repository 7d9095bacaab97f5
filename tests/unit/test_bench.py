"""Benchmarks: what they compute and refuse, without processes; tests/e2e/test_bench.py runs them."""

import json

import pytest
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools.bench import collectives, ranks, rollout, step, sync
from tests.conftest import ROOT

LARGE = "qwen3-8b-dapo-fp16-2n8g"
TINY = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"


def refused(*arguments):
    answer = CliRunner().invoke(app, list(map(str, arguments)))
    assert answer.exit_code == 2, answer.output
    return answer.stderr


def test_bandwidths_are_those_of_nccl_tests():
    seconds = [0.004, 0.010, 0.030]
    row = collectives.row("all_reduce", 4, 8_000_000, seconds)
    assert row["latency_us"] == pytest.approx(10_000)
    assert (row["latency_us_low"], row["latency_us_high"]) == pytest.approx((4_000, 30_000))
    assert row["algorithm_gb_per_s"] == pytest.approx(0.8)
    assert row["bus_gb_per_s"] == pytest.approx(0.8 * 2 * 3 / 4)
    factors = {name: factor(4) for name, factor in collectives.BUS_FACTORS.items()}
    halves = dict.fromkeys(("all_gather", "reduce_scatter"), 0.75)
    assert factors == {"all_reduce": 1.5, **halves, "broadcast": 1.0}


def test_fractions_are_medians_over_turns():
    row = sync.row([(1.0, 2.0, 10**9), (3.0, 4.0, 10**9), (1.0, 8.0, 10**9)])
    assert (row["seconds"], row["seconds_low"], row["seconds_high"]) == (4.0, 2.0, 8.0)
    assert row["gb_per_s"] == 0.25
    assert row["fraction_of_broadcast"] == 0.5  # of 0.5, 0.75, 0.125
    row = rollout.row([(90.0, 100.0), (50.0, 100.0), (240.0, 200.0)])
    assert (row["tokens_per_s"], row["raw_tokens_per_s"]) == (90, 100)
    assert row["fraction_of_raw_server"] == 0.9  # of 0.9, 0.5, 1.2


def test_steps_of_an_existing_run(tmp_path):
    def metrics(number, rollout_s, update_s, beside=0.0):
        parts = {"time/rollout_s": rollout_s, "time/score_s": 0.5, "time/update_s": update_s}
        whole = rollout_s + 0.5 + update_s + 0.5 + beside
        more = {"time/step_s": whole, "time/eval_s": beside, "tokens/step": 800}
        return json.dumps({"step": number, **parts, **more}) + "\n"

    (tmp_path / "recipe.yaml").write_text(load(TINY).to_yaml())
    # The last update was skipped, so it has no sync; and an evaluation that is no part of the step.
    rows = [metrics(0, 99, 99), metrics(1, 2, 1), metrics(2, 1, 1), metrics(3, 3, 4, beside=50)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    arguments = ["bench", "step", "--run", str(tmp_path), "--json"]
    result = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert (result["steps"], result["ranks"]) == (3, 2)
    assert (result["step_s"], result["step_s_low"], result["step_s_high"]) == (4, 3, 8)
    assert (result["tokens_per_s"], result["tokens_per_s_per_rank"]) == (200, 100)
    shares = {row["part"]: row["share"] for row in result["rows"]}
    expected = {"rollout": 0.4, "score": 0.1, "update": 0.4, "sync": 0.0, "other": 0.1}
    assert shares == pytest.approx(expected)
    assert result["parts"] == pytest.approx(
        {"rollout": 2, "score": 0.5, "update": 1, "sync": 0, "other": 0.5}
    )
    assert result["overlap"] == 0
    assert "steps 3, step_s 4" in CliRunner().invoke(app, arguments[:-1]).stdout
    assert "has 4 step(s), of which 4" in refused(*arguments, "--warm-up", 4)
    assert "holds no metrics.jsonl" in refused("bench", "step", "--run", tmp_path / "none")


def test_sampling_that_the_learner_does_not_wait_for_is_overlap():
    row = {"time/step_s": 4.0, "time/update_s": 3.0, "tokens/step": 8}
    result = step.shares([{**row, "time/rollout_s": 4.0, "time/rollout_wait_s": 1.0}], ranks=1)
    assert result["overlap"] == 0.75
    assert (result["sampling_s"], result["step_over_longest"]) == (4, 1)
    assert result["parts"]["rollout"] == 1
    assert result["parts"]["other"] == 0


def test_launched_ranks_are_recognised():
    assert ranks.launched({}) is None
    assert ranks.launched({"SLURM_STEP_NUM_TASKS": "1"}) is None  # a job's one task starts its own
    assert ranks.launched({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}) == 4
    assert ranks.launched({"RANK": "0", "WORLD_SIZE": "1"}) == 1
    assert ranks.launched({"OMPI_COMM_WORLD_SIZE": "2"}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learner", "--dtypes", "fp8"], "no 'fp8'; there are fp16, bf16, fp32"),
        (["sync", "--buckets", "0"], "--buckets 0: write whole numbers"),
        (["sync", "--set", "rollout.replay=runs/x/rollouts"], "there are no servers to measure"),
        (["collectives", "--set", "learner.ranks=4"], "torchrun --nproc-per-node 4"),
        (["learner", "--set", "learner.tensor_paralel=2"], "did you mean 'tensor_par"),
        (
            ["learner", "--set", "learner.ranks=2", "--sequences", 3],
            "3 is not a multiple of the 2 data-parallel",
        ),
        (["learner", "--nodes", 2], "there is no slurm: section"),
        (["sync", "--recipe", LARGE, "--nodes", 2], "starts servers on one node"),
    ],
)
def test_bad_usage_is_refused_before_anything_starts(arguments, message):
    assert message in refused("bench", *arguments)
