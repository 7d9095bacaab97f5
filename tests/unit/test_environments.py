"""What learner ranks and servers are told in their environments: NCCL, interfaces, proxies."""

import json
import os
import textwrap
from pathlib import Path

import pytest

from launch import bootstrap, server_supervisor
from megatron_fp16rl import parallel, train
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.recipe import Layout
from megatron_fp16rl.rollout import server as servers
from tests import models
from tests.conftest import python, run_ranks

# SGLang 0.5.23 sets more of NCCL's names than those that both sides need, none of which takes part in
# what ranks of one communicator tell each other: buffers of CUDA graphs.
OF_SERVERS_ALONE = {"NCCL_GRAPH_REGISTER", "NCCL_GRAPH_MIXING_SUPPORT"}


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


def learner_environment(recipe):
    """What a rank has when it is about to join the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "initialize", stop)
        patch.setattr(os, "environ", dict(os.environ))
        with pytest.raises(Stop):
            train.train(recipe, Path(), Path())
        return os.environ


def server_start(recipe, private):
    """Command and environment with which a server is started."""
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "spawn", lambda *given: started.append(given))
        folder = model_folder(recipe.model)
        served = servers.start(servers.ServerConfig.of(recipe), folder, private, private, 0)
    served.scratch.rmdir()
    ((command, _, environment),) = started
    return command, {**os.environ, **environment}


# In each child, our own start of a server, up to where SGLang would start its processes.
SERVER = """
    import json, os, sys
    from megatron_fp16rl import platform
    platform.current().prepare_server()
    import sglang.launch_server
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from megatron_fp16rl.rollout import serve

    for command, environment in json.loads(sys.argv[1]):
        if os.fork():
            assert os.wait()[1] == 0
            continue
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = command[2:]

        def run_server(arguments):
            _set_envs_and_config(arguments)
            print("environment", json.dumps(dict(os.environ)), flush=True)

        sglang.launch_server.run_server = run_server
        serve.main({"api": "a", "admin": "b"})
        os._exit(0)
"""

TREE = dict(zip(nccl.NAMES[2:], ("allreduce:tree", "8", "8"), strict=True))
TWO_RANKS = {"deterministic": True, "tensor_parallel": 2}
OFF = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
USERS = {"NCCL_CUMEM_ENABLE": "1", "NCCL_ALGO": "ring", "NCCL_IB_DISABLE": "1"}
CASES = [  # settings of rollout, what the user has set, what both sides are to have
    ({}, {}, OFF),
    (TWO_RANKS, {}, {**OFF, **TREE}),
    (TWO_RANKS, USERS, {**OFF, **TREE, **USERS}),
    ({"sglang": {"enable_symm_mem": True}}, {"NCCL_NVLS_ENABLE": "0"}, dict.fromkeys(OFF, "1")),
    ({"sglang": {"enable-nccl-nvls": True}}, {}, {**OFF, "NCCL_NVLS_ENABLE": "1"}),
]


def of_nccl(environment):
    return {name: value for name, value in environment.items() if name.startswith("NCCL_")}


def test_learner_and_servers_agree_on_every_nccl_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # of a rank that starts servers itself
    learner, starts = [], []
    for settings, chosen, _ in CASES:
        recipe = models.recipe(rollout={**models.recipe().rollout.model_dump(), **settings})
        with monkeypatch.context() as patch:
            for name in of_nccl(os.environ):
                patch.delenv(name)
            for name, value in chosen.items():
                patch.setenv(name, value)
            learner.append(learner_environment(recipe))
            starts.append(server_start(recipe, tmp_path))
    said = python("-c", textwrap.dedent(SERVER), json.dumps(starts)).stdout.splitlines()
    served = [json.loads(line.split(" ", 1)[1]) for line in said if line.startswith("environment")]
    for (settings, _, wanted), ranks, server in zip(CASES, learner, served, strict=True):
        assert of_nccl(ranks) == wanted, settings
        theirs = of_nccl(server)
        alone = {name: theirs[name] for name in OF_SERVERS_ALONE & set(theirs)}
        assert theirs == {**wanted, **alone}, settings
        assert server["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


@pytest.mark.parametrize("head", [None, "fp32"])
def test_servers_have_the_learners_head(tmp_path, head):
    command, _ = server_start(models.recipe(precision={"head": head}), tmp_path)
    assert ("--enable-fp32-lm-head" in command) == (head == "fp32")


def test_a_backend_that_wants_shared_memory_has_it_on_both_sides(monkeypatch):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    for backend, wanted in (("deepep_v2", "1"), ("deepep", "0")):
        values = {**models.recipe().rollout.model_dump(), "sglang": {"moe-a2a-backend": backend}}
        names = nccl.agreed(models.recipe(rollout=values).rollout)
        assert names["NCCL_CUMEM_ENABLE"] == wanted


def test_megatrons_overlap_wants_one_queue_where_tensors_are_divided(monkeypatch):
    monkeypatch.setattr(parallel.platform.current(), "prepare_learner", stop)
    for layout, queues in ((Layout(), None), (Layout(ranks=2, tensor_parallel=2), "1")):
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        with pytest.raises(Stop):
            parallel.initialize(layout, 0)
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == queues


def test_megatrons_groups_wait_as_long_as_the_run():
    (minutes,) = run_ranks(1, "collectives.patience", timeout_s=7201)
    assert minutes == dict.fromkeys(("tensor", "data", "expert", "replica"), 121)


def test_servers_of_several_nodes_are_on_the_interface_that_ranks_would_take(monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} was to be resolved")

    monkeypatch.setattr(bootstrap.socket, "gethostbyname", refuse)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    recipe = models.recipe(slurm={"gpus_per_node": 1, "learner_nodes": 1, "rollout_nodes": 1})
    assert server_supervisor.place_task(recipe, slurm).host == "127.0.0.1"  # lo's


def test_under_mpi_rank_0s_nccl_settings_are_those_of_all(monkeypatch):
    class World:
        rank, size = 1, 2

        def allgather(self, name):
            return ["other", name]

        def bcast(self, _):
            return ("127.0.0.1", 15001), None, {"NCCL_CUMEM_ENABLE": "1"}

    monkeypatch.setattr(bootstrap, "mpi_world", World)
    mine = {"NCCL_ALGO": "ring", "NCCL_IB_DISABLE": "1"}
    monkeypatch.setattr(os, "environ", mine)
    bootstrap.from_mpi()
    assert mine["NCCL_CUMEM_ENABLE"] == "1"
    assert "NCCL_ALGO" not in mine
    assert mine["NCCL_IB_DISABLE"] == "1"  # each node's own affair


def test_a_server_asks_itself_without_a_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "10.0.0.1, .site")
    monkeypatch.setenv("NO_PROXY", ".site,other")
    _, environment = server_start(models.recipe(), tmp_path)
    wanted = "127.0.0.1,localhost,10.0.0.1,.site,other"
    assert environment["no_proxy"] == environment["NO_PROXY"] == wanted
