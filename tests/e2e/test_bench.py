"""Benchmarks with real ranks, servers and Slurm: what they do is checked, not how fast they are."""

import json
from itertools import product

import pytest

from megatron_fp16rl.tools.bench.collectives import BUS_FACTORS
from megatron_fp16rl.utils.processes import free_port
from tests.conftest import python

SMALL = tuple(
    word
    for setting in ("num_hidden_layers=2", "hidden_size=128", "intermediate_size=384")
    for word in ("--set", f"model.build.config.{setting}")
)


def bench(*arguments, ranks=1):
    torchrun = ("torch.distributed.run", "--nproc-per-node", ranks, "--master-addr", "127.0.0.1")
    launcher = () if ranks == 1 else (*torchrun, "--master-port", free_port("127.0.0.1"), "-m")
    done = python("-m", *launcher, "megatron_fp16rl.cli", "bench", *arguments, "--json")
    return json.loads(done.stdout)


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


def test_collectives_on_four_ranks():
    result = bench(
        *("collectives", "--set", "learner.tensor_parallel=2", "--repeats", 2),
        *("--max-bytes", 16384),
        ranks=4,
    )
    assert result["layout"]["tensor"] == result["layout"]["data"] == 2
    cases = [(row["group"], row["operation"], row["bytes"]) for row in result["rows"]]
    assert set(cases) >= set(product(("world", "tensor", "data"), BUS_FACTORS, (1024, 16384)))
    assert not [group for group, *_ in cases if group == "pipeline"]  # of one rank
    for row in result["rows"]:
        assert row["algorithm_gb_per_s"] == pytest.approx(row["bytes"] / row["latency_us"] / 1e3)


def test_sync_to_a_real_server():
    result = bench("sync", *SMALL, "--repeats", 1, "--buckets", "1,64")
    assert result["benchmark"] == "sync"
    assert set(result) > {"platform", "versions", "hosts", "threads", "when"}
    rows = result["rows"]
    assert [(row["transport"], row["bucket_mib"]) for row in rows] == [
        ("distributed", 1),
        ("distributed", 64),
        ("disk", None),
    ]
    assert rows[0]["bytes"] == rows[1]["bytes"] < rows[2]["bytes"]  # with safetensors' header
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
    assert all(row["tokens_per_s"] > 0 for row in result["rows"])
