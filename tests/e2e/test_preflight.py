"""Whether nodes are fit: on a real Slurm of four nodes, and by judgement."""

import os
import re
import shlex
import sys

import pytest
import torch

from launch import preflight
from launch.bootstrap import BootstrapError, mpi_world, own_address
from megatron_fp16rl.recipe import load
from tests.conftest import ROOT, python


def facts(node, **changes):
    versions = {"python": "3.11.9", "torch": "2.14.1", "devices": "H100, H100"}
    healthy = {"node": node, "versions": versions, "wrong": [], "gb_per_s": 20.0}
    return {**healthy, **changes}


def test_the_node_that_is_unlike_the_others_is_named():
    versions = facts("a")["versions"]
    for changes, complaint in (
        ({"versions": {**versions, "torch": "2.13.0"}}, "torch is 2.13.0, elsewhere 2.14.1"),
        ({"versions": {**versions, "NCCL_ALGO": "ring"}}, "is ring, elsewhere not there"),
        ({"versions": {**versions, "devices": "H100"}}, "devices is H100, elsewhere H100, H100"),
        ({"wrong": ["is ill"]}, "is ill"),
        ({"gb_per_s": 1.0}, "exchanges 1.00 GB/s, others 20.00"),
    ):
        (problem,) = preflight.compare(
            [facts("a"), facts("b"), facts("bad", **changes), facts("c")]
        )
        assert problem["node"] == "bad"
        assert re.search(complaint, problem["what"])
    assert preflight.compare([facts(n) for n in "abc"]) == []


def test_a_missing_node_does_not_hold_the_others(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        load(ROOT / "recipes/tiny/dense-grpo-fp16.yaml").to_yaml()
    )
    code = (
        "import sys, time; from launch import preflight; preflight._TIMEOUT_S = 0.5\n"
        "preflight.from_mpi = lambda interface: time.sleep(600)\nsys.exit(preflight.main())"
    )
    done = python("-c", code, tmp_path, check=False)
    assert done.returncode == 1
    assert "waits for the other nodes" in done.stderr
    assert "Timeout" in done.stderr
    assert "in main" in done.stderr


@pytest.mark.parametrize("kind", ["Kernel Module", "Open Kernel Module for x86_64"])
def test_versions_are_of_drivers_and_of_nccls_settings_but_interfaces(monkeypatch, tmp_path, kind):
    file = tmp_path / "version"
    file.write_text(
        f"NVRM version: NVIDIA UNIX {kind}  580.65.06  Release Build  Sun Jul 27 2025\n"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(preflight, "Path", lambda _: file)
    names = {"NCCL_SOCKET_IFNAME": "=ib0", "NCCL_ALGO": "ring"}
    monkeypatch.setattr(os, "environ", names)
    versions = preflight._versions()
    gpu = {"driver": "580.65.06", "cudnn": "91002", "nccl": "2.28.3", "NCCL_ALGO": "ring"}
    assert gpu.items() <= versions.items()
    assert "NCCL_SOCKET_IFNAME" not in versions


def test_a_limit_of_locked_memory_counts_where_there_is_infiniband(monkeypatch, tmp_path):
    adapters = tmp_path / "infiniband"
    limits = [65536]
    monkeypatch.setattr(preflight, "Path", lambda path: adapters)
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: (limits[0], limits[0]))
    assert preflight._lockable() is None
    (adapters / "mlx5_0").mkdir(parents=True)
    (problem,) = preflight.examine()["wrong"]
    assert re.search("lock 64 KiB of memory only.*ulimit -l unlimited", problem)
    limits[0] = preflight.resource.RLIM_INFINITY
    assert preflight._lockable() is None


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
    section = "slurm={learner_nodes: 2, gpus_per_node: 0, interface: ib0}"
    recipe = load(ROOT / "recipes/tiny/dense-grpo-fp16.yaml", [section])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "launch.preflight", str(tmp_path)]
    run = ["srun", f"--chdir={ROOT}"]
    report = cluster.run(
        *run, "--nodes=4", "--ntasks=4", "--mpi=pmi2", *command, timeout=120, check=False
    )
    speeds = re.findall(r"^(\w+): no GPU, (\S+) GB/s$", report, re.MULTILINE)
    assert [node for node, _ in speeds] == cluster.nodes
    assert all(float(speed) > 0 for _, speed in speeds)
    # Speed is chance on one machine.
    assert not re.search(r"^problem: (?!.*exchanges)", report, re.MULTILINE)
    wrong = shlex.join([*run, "--nodes=2", "--ntasks=2", "--mpi=none", *command]) + " 2>&1"
    output = cluster.run("bash", "-c", wrong, timeout=120, check=False)
    assert "MPI knows of 1 process(es), but 2 were started" in output
