"""Benchmarks with real ranks, servers and Slurm: what they do is checked, not how fast they are."""

import json
from itertools import product
from pathlib import Path

import pytest

from megatron_fp16rl.tools.bench import collectives, common
from tests.conftest import python, run_ranks

TINY = ("--layers", 2, "--hidden", 128, "--json")
WORLD = 3


def bench(*arguments, **options):
    done = python("-m", "megatron_fp16rl.cli", "bench", *arguments, **options)
    return json.loads(done.stdout)


# By operation: the numbers that rank `me` must hold; each rank has 2 elements of 6.
PAYLOADS = {
    "all_reduce": lambda me: [1, 2, 3, 4, 5, 1],
    "reduce_scatter": lambda me: [[1, 2], [3, 4], [5, 1]][me],
    "all_gather": lambda me: [0, 1, 1, 2, 2, 3],
    "all_to_all": lambda me: [16 * me + n for n in (0, 1, 1, 2, 2, 3)],
    "broadcast": lambda me: [0, 1, 2, 3, 4, 5],
    "send_recv": lambda me: [(me - 1) % WORLD + n for n in range(6)],
}


def test_payloads_are_right_and_wrong_ones_are_refused():
    for me, rank in enumerate(run_ranks(WORLD, "collectives.collective_payloads", size=12)):
        assert set(rank["results"]) == {f"{o} {d}" for o in PAYLOADS for d in ("fp16", "bf16")}
        for case, numbers in rank["results"].items():
            assert numbers == PAYLOADS[case.split()[0]](me), case
        assert f"gave rank {me} (" in rank["complaint"]
        assert "the number 1.0 at 1, not 2.0" in rank["complaint"]


def test_learner_at_two_layouts():
    result = bench(
        *("learner", *TINY, "--ranks", 2, "--sequences", 4, "--tokens", 16, "--repeats", 2),
        *("--layout", "tensor_parallel=2", "--layout", ""),
    )
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


def test_sync_to_a_real_server(tmp_path):
    file = tmp_path / "sync.json"
    result = bench("sync", *TINY, "--repeats", 1, "--buckets", "1,64", "--out", file)
    assert result == json.loads(file.read_text())
    assert result["benchmark"] == "sync"
    assert set(result) > {"platform", "versions", "hosts", "threads", "when"}
    rows = result["rows"]
    assert [(row["transport"], row["bucket_mib"]) for row in rows] == [
        ("distributed", 1),
        ("distributed", 64),
        ("disk", None),
    ]
    model = common.load_recipe(None, [], layers=2, hidden=128).model
    vocabulary = len(model.build.alphabet) + 2
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 2 * 128 + 2 * 32
    size = 2 * (2 * vocabulary * 128 + 2 * layer + 128)  # fp16
    assert [row["bytes"] for row in rows[:2]] == [size] * 2
    assert size < rows[2]["bytes"] < 1.1 * size  # with safetensors' header
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        fraction = row["broadcast_seconds"] / row["seconds"]
        assert row["fraction_of_broadcast"] == pytest.approx(fraction)


def test_rollouts_of_a_real_server():
    result = bench(
        *("rollout", *TINY, "--repeats", 1, "--concurrency", "1,16"),
        *("--set", "rollout.max_new_tokens=4"),
    )
    assert [row["concurrency"] for row in result["rows"]] == [1, 16]
    for row in result["rows"]:
        fraction = row["tokens_per_s"] / row["raw_tokens_per_s"]
        assert row["fraction_of_raw_server"] == pytest.approx(fraction)


def test_collectives_as_a_job_on_four_nodes(cluster, tmp_path):
    tmp_path.chmod(0o755)
    kinds, dtypes, (small, large) = "world,tensor,pipeline,data", ("fp16", "fp32"), (1024, 65536)
    job = bench(
        *("collectives", "--nodes", 4, "--ranks", 4, "--set", "learner.tensor_parallel=2"),
        *("--set", "slurm={gpus_per_node: 0}", "--set", f"trainer.run_root={tmp_path}"),
        *("--groups", kinds, "--dtypes", ",".join(dtypes), "--repeats", 2, "--json"),
        *("--min-bytes", small, "--max-bytes", large, "--factor", 64),
        environment=cluster.environment,
    )
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
    assert result["left_out"] == [{"group": "pipeline", "reason": "of one rank: nothing is sent"}]
