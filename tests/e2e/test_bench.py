"""Benchmarks with real ranks, servers and Slurm: what they do is checked, not how fast they are."""

import json
from itertools import product
from pathlib import Path

import pytest

from megatron_fp16rl.tools.bench.collectives import BUS_FACTORS
from megatron_fp16rl.tools.selftest.result import Report
from megatron_fp16rl.utils.processes import free_port
from tests.conftest import python, run_ranks

SMALL = tuple(
    word
    for setting in ("num_hidden_layers=2", "hidden_size=128", "intermediate_size=384")
    for word in ("--set", f"model.build.config.{setting}")
)


# Keys that users rely on; more may come.
KEYS = {
    "learner": {"dtype", "tokens_per_s", "layout"},
    "sync": {"transport", "bytes", "tensors", "seconds", "gb_per_s", "fraction_of_broadcast"},
    "checkpoint": {"background", "step_s", "saving_step_s", "saving_over_plain", "save_s"},
    "rollout": {"concurrency", "tokens_per_s", "raw_tokens_per_s", "fraction_of_raw_server"},
}


def checked(name, printed):
    result = json.loads(printed)
    for row in result.get("rows", []):
        assert set(row) >= KEYS.get(name, set())
    return result


def bench(name, *arguments, ranks=1):
    """What `fp16rl bench` prints on rank 0 of forked ranks."""
    command = ["bench", name, *map(str, arguments), "--json"]
    return checked(name, run_ranks(ranks, "servers.fp16rl", 300, arguments=command)[0])


def test_learner_on_two_ranks():
    result = bench(
        *("learner", *SMALL, "--sequences", 4, "--tokens", 16, "--repeats", 2),
        *("--set", "learner.tensor_parallel=2"),
        ranks=2,
    )
    assert result["hosts"] == result["hosts"][:1] * 2
    assert [row["dtype"] for row in result["rows"]] == ["fp32", "fp16"]
    for row in result["rows"]:
        assert row["layout"] == "2 ranks, tensor_parallel=2"
        assert row["tokens_per_s"] == pytest.approx(4 * 16 / row["seconds"])
        assert row["tokens_per_s_per_rank"] == pytest.approx(row["tokens_per_s"] / 2)
    assert result["grad_norm_difference"] < 1e-3
    assert result["fp16_over_fp32"] > 0


def test_variants_of_the_learner_compute_the_same():
    result = bench(
        *("learner", *SMALL, "--variants", "packed,rows,bare", "--varied", "--repeats", 1),
        *("--sequences", 8, "--tokens", 12, "--set", "precision=fp32"),
        *("--set", "learner.tensor_parallel=2", "--set", "learner.sequence_parallel=true"),
        ranks=2,
    )
    passes = [(row["variant"], row["pass"]) for row in result["rows"]]
    assert passes == [*product(("packed", "rows"), ("score", "update")), ("bare", "update")]
    norms = [row["grad_norm"] for row in result["rows"] if row["pass"] == "update"]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert set(result["cpu_speed_ratios"]) == {
        *("score_packed_over_rows", "update_packed_over_rows", "update_packed_over_bare")
    }


def test_checkpoints_on_two_ranks(tmp_path):
    result = bench(
        *("checkpoint", *SMALL, "--sequences", 4, "--tokens", 16, "--repeats", 1),
        *("--set", f"trainer.run_root={tmp_path}"),
        ranks=2,
    )
    at_once, later = result["rows"]
    assert (at_once["background"], later["background"]) == (False, True)
    assert at_once["step_beside_s"] is None
    assert later["step_beside_s"] > 0, "a step was made while it was being written"
    assert result["bytes"] > 1e6
    assert list(tmp_path.iterdir()) == []


def test_sync_to_a_real_server():
    two_stages = ("--set", "learner.ranks=2", "--set", "learner.pipeline_parallel=2")
    torchrun = ("torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1")
    done = python(
        *("-m", *torchrun, "--master-port", free_port("127.0.0.1"), "-m", "megatron_fp16rl.cli"),
        *("bench", "sync", *SMALL, *two_stages, "--repeats", 1, "--buckets", "1,64", "--json"),
    )
    result = checked("sync", done.stdout)
    assert result["benchmark"] == "sync"
    assert set(result) > {"platform", "versions", "hosts", "threads", "when"}
    rows = result["rows"]
    assert [(row["transport"], row["bucket_mib"]) for row in rows] == [
        *(("sliced", 1), ("sliced", 64), ("distributed", 1), ("distributed", 64), ("disk", None))
    ]
    sizes = [row["bytes"] for row in rows]
    assert len({*sizes[:4]}) == 1
    assert sizes[3] < sizes[4]  # with safetensors' header
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        fraction = row["broadcast_seconds"] / row["seconds"]
        assert row["fraction_of_broadcast"] == pytest.approx(fraction)


def test_rollouts_of_a_real_server():
    result = bench(
        *("rollout", *SMALL, "--repeats", 1, "--concurrency", "1,16"),
        *("--set", "rollout.max_new_tokens=4"),
    )
    assert [row["concurrency"] for row in result["rows"]] == [1, 16]
    for row in result["rows"]:
        fraction = row["tokens_per_s"] / row["raw_tokens_per_s"]
        assert row["fraction_of_raw_server"] == pytest.approx(fraction)


def test_collectives_as_a_job_on_four_nodes(cluster, tmp_path):
    tmp_path.chmod(0o755)
    done = python(
        *("-m", "megatron_fp16rl.cli", "bench", "collectives", "--nodes", 4, "--json"),
        *("--max-bytes", 16384, "--repeats", 1, "--set", f"trainer.run_root={tmp_path}"),
        *("--set", "learner.tensor_parallel=2", "--set", "slurm={gpus_per_node: 0}"),
        environment=cluster.environment,
    )
    job = json.loads(done.stdout)
    assert "to start at" in job["check"]
    state = cluster.wait_for(job["jobs"][0], "COMPLETED", "FAILED", timeout=180)
    assert state == "COMPLETED", Path(job["output"]).read_text()
    result = json.loads(Path(job["result"]).read_text())
    assert result["hosts"] == cluster.nodes
    assert result["layout"]["tensor"] == result["layout"]["data"] == 2
    cases = [(row["group"], row["operation"], row["bytes"]) for row in result["rows"]]
    assert set(cases) == set(product(("world", "tensor", "data"), BUS_FACTORS, (1024, 16384)))
    for row in result["rows"]:
        assert row["algorithm_gb_per_s"] == pytest.approx(row["bytes"] / row["latency_us"] / 1e3)


def test_a_selftest_as_a_job_on_two_nodes(cluster, tmp_path):
    """Each node runs the row, collectives run over both, and `fp16rl status` says how it ended."""
    tmp_path.chmod(0o755)
    command = ("-m", "megatron_fp16rl.cli", "selftest", "--quick", "--only", "collectives")
    slurm = ("--set", "slurm={gpus_per_node: 0}", "--set", f"trainer.run_root={tmp_path}")
    done = python(*command, "--nodes", 2, *slurm, "--json", environment=cluster.environment)
    job = json.loads(done.stdout)
    state = cluster.wait_for(job["jobs"][0], "COMPLETED", "FAILED", timeout=180)
    assert state == "COMPLETED", Path(job["output"]).read_text()
    report = Report.model_validate_json(Path(job["result"]).read_text())
    rows = [(row.host, row.name, row.status) for row in report.rows]
    assert rows == [(node, "collectives", "pass") for node in cluster.nodes[:2]]
    pairs = [name for name in report.rows[0].measured if name.startswith("slowest pair")]
    assert any("two machines" in name for name in pairs)
    status = python(
        *("-m", "megatron_fp16rl.cli", "status", job["run"], "--json"),
        environment=cluster.environment,
    )
    seen = json.loads(status.stdout)
    assert (seen["state"], seen["reason"]) == ("done", "2 pass")
