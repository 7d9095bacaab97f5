"""Who a process is, and whether its nodes are fit: on a real Slurm of four nodes, and by judgement."""

import json
import os
import re
import shlex
import sys
from itertools import combinations

import pytest
import torch

from launch import preflight
from launch.bootstrap import BootstrapError, mpi_world, own_address
from launch.preflight import judge, judge_pairs, rounds
from megatron_fp16rl.recipe import load
from tests.conftest import ROOT, python


def fact(node, **changes):
    healthy = {
        "node": node,
        "clock": 1000.0,
        "versions": {"python": "3.11.9", "torch": "2.14.1"},
        "devices": ["H100"] * 8,
        "memory_gib": 900.0,
        "disk_gib": 500.0,
        "shared": True,
        "writable": True,
        "gemm": {"cuda:0": 0.0},
        "lockable_bytes": None,
    }
    return {**healthy, **changes}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"versions": {"python": "3.11.9", "torch": "2.13.0"}},
            "torch is 2.13.0, elsewhere 2.14.1",
        ),
        ({"versions": {"python": "3.11.9"}}, "torch is not there, elsewhere 2.14.1"),
        (
            {"versions": {"python": "3.11.9", "torch": "2.14.1", "NCCL_IB_HCA": "mlx5_0"}},
            "NCCL_IB_HCA is mlx5_0, elsewhere not there",
        ),
        ({"lockable_bytes": 65536}, "lock 64 KiB of memory only.*ulimit -l unlimited"),
        ({"devices": ["H100"] * 7}, "unlike the others"),
        ({"clock": 1060.0}, r"clock is off by \+60.0 s"),
        ({"shared": False}, "does not see"),
        ({"writable": False}, "cannot write"),
        ({"memory_gib": 0.5}, "0.5 GiB of memory"),
        ({"disk_gib": 0.1}, "0.1 GiB are free"),
        ({"gemm": {"cuda:0": 0.0, "cuda:3": 8.0}}, "device cuda:3 multiplies"),
        ({"gemm": {"cuda:0": float("nan")}}, "by nan"),
    ],
)
def test_the_node_that_is_unlike_the_others_is_named(changes, complaint):
    nodes = [fact("a"), fact("b"), fact("bad", **changes), fact("c")]
    (problem,) = judge(nodes)
    assert problem.node == "bad"
    assert re.search(complaint, problem.what)
    assert judge([fact(n) for n in "abc"]) == []


def test_a_node_that_never_comes_does_not_hold_the_others():
    waits = """
import sys, time
from launch import bootstrap, preflight
bootstrap.mpi_world = lambda: time.sleep(600)
bootstrap.from_mpi = lambda interface: None
preflight._PATIENCE_S = 0.5
sys.argv[1:] = ["recipes/tiny"]
from megatron_fp16rl import recipe
recipe.load = lambda path: recipe_of
from types import SimpleNamespace
recipe_of = SimpleNamespace(slurm=None)
sys.exit(preflight.main())
"""
    done = python("-c", waits, check=False)
    assert done.returncode == 1
    assert "waits for the other nodes" in done.stderr
    assert "Timeout" in done.stderr
    assert "in main" in done.stderr


@pytest.mark.parametrize(
    "driver", ["NVIDIA UNIX x86_64 Kernel Module", "NVIDIA UNIX Open Kernel Module for x86_64"]
)
def test_a_node_says_what_its_gpus_kernels_come_from(monkeypatch, tmp_path, driver):
    file = tmp_path / "version"
    file.write_text(
        f"NVRM version: {driver}  580.65.06  Release Build  Sun Jul 27 06:40:39 UTC 2025\n"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    for name in ("_gemm_errors", "_devices", "_sees", "_writes"):
        monkeypatch.setattr(preflight, name, lambda *_: None)
    monkeypatch.setattr(preflight, "Path", lambda _: file)
    monkeypatch.setattr(preflight, "_lockable", lambda: 65536)
    for name, value in (("LOCAL_RANK", "0"), ("GLOO_SOCKET_IFNAME", "lo"), ("NCCL_ALGO", "ring")):
        monkeypatch.setenv(name, value)
    found = preflight.examine(tmp_path, "")
    libraries = {"driver": "580.65.06", "cudnn": "91002", "nccl": "2.28.3", "NCCL_ALGO": "ring"}
    assert libraries.items() <= found["versions"].items()
    assert found["lockable_bytes"] == 65536


def test_settings_of_nccl_are_compared_but_for_interfaces(monkeypatch):
    for name in [n for n in os.environ if n.startswith("NCCL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib0")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5_0")
    assert preflight._nccl() == {"NCCL_IB_HCA": "mlx5_0"}


def test_a_limit_of_locked_memory_counts_where_there_is_infiniband(monkeypatch, tmp_path):
    adapters = tmp_path / "infiniband"
    limits = [65536]
    monkeypatch.setattr(preflight, "Path", lambda path: adapters)
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: (limits[0], limits[0]))
    assert preflight._lockable() is None
    (adapters / "mlx5_0").mkdir(parents=True)
    assert preflight._lockable() == 65536
    limits[0] = preflight.resource.RLIM_INFINITY
    assert preflight._lockable() is None


def speeds(nodes, slow):
    return [
        {"nodes": list(pair), "gb_per_s": 1.0 if slow(set(pair)) else 20.0, "latency_us": 5.0}
        for pair in combinations(nodes, 2)
    ]


def test_slow_connections_are_blamed_on_a_node_or_on_a_pair():
    assert judge_pairs(speeds("abcde", lambda pair: False)) == []
    (problem,) = judge_pairs(speeds("abcde", lambda pair: "c" in pair))
    assert problem.node == "c"
    assert "slow with 4 of 4 nodes" in problem.what
    (problem,) = judge_pairs(speeds("abcde", lambda pair: pair == {"a", "d"}))
    assert problem.node is None
    assert "a and d exchange 1.00 GB/s" in problem.what


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_pair_plays_once_and_nobody_twice_in_a_round(count):
    table = list(rounds(count))
    assert sorted(pair for pairs in table for pair in pairs) == list(combinations(range(count), 2))
    for pairs in table:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players))


def test_a_lost_world_and_an_unknown_interface_are_refused(monkeypatch):
    assert mpi_world().size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(BootstrapError, match=r"knows of 1 .* but 4 were started.*--mpi=pmi2"):
        mpi_world()
    assert own_address("lo") == "127.0.0.1"
    with pytest.raises(BootstrapError, match=r"no network interface 'ib9'; there are: .*lo"):
        own_address("ib9")


def test_four_nodes_of_a_real_slurm(cluster, tmp_path):
    tmp_path.chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    asked = "slurm={learner_nodes: 2, gpus_per_node: 0, interface: ib0}"
    recipe.write_text(load(ROOT / "recipes/tiny/dense-grpo-fp16.yaml", [asked]).to_yaml())
    command = [sys.executable, "-m", "launch.preflight", str(tmp_path), "--json"]
    run = ["srun", "--nodes=4", "--ntasks=4", f"--chdir={ROOT}"]
    found = json.loads(cluster.run(*run, "--mpi=pmi2", *command, timeout=120, check=False))
    assert [node["node"] for node in found["nodes"]] == cluster.nodes
    assert {node["interface"] for node in found["nodes"]} == {"ib0"}
    assert sorted(sorted(pair["nodes"]) for pair in found["pairs"]) == sorted(
        list(pair) for pair in combinations(cluster.nodes, 2)
    )
    assert not [p for p in found["problems"] if "GB/s" not in p["what"]]  # speed is chance here
    assert list(tmp_path.iterdir()) == [recipe]
    wrong = shlex.join([*run, "--mpi=none", *command]) + " 2>&1"
    said = cluster.run("bash", "-c", wrong, timeout=120, check=False)
    assert "MPI knows of 1 process(es), but 4 were started" in said
