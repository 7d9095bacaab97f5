"""Rollout servers that are killed and hang, in a real run and in the middle of a weight update."""

import contextlib
import json
import math
import threading
import time
from dataclasses import asdict

import psutil
import pytest

from launch.server_supervisor import Placement, ServerSupervisor, place_task
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.recipe import load
from megatron_fp16rl.rollout import server as servers
from megatron_fp16rl.rollout.client import Sampling
from megatron_fp16rl.rollout.pool import IN_FLIGHT, Pool
from megatron_fp16rl.rollout.weight_sync.publisher import largest
from tests import models
from tests.conftest import ROOT, run_ranks
from tests.runs import TINY, Run

LOOPBACK = "127.0.0.1"
SMALL = {
    "warm_start": "null",
    "trainer.steps": 100000,
    "trainer.eval_every": 100000,
    "trainer.eval_prompts": 16,
    "rollout.servers": 2,
    "rollout.record": "true",
    "rollout.prompts": 8,
    "rollout.samples": 4,
    "rollout.max_new_tokens": 60,  # the longest part of a step
    "learner.global_batch_size": 16,
    "learner.ranks": 1,
    "learner.tensor_parallel": 1,
    "rollout.health_timeout_s": 8,
    "sync.timeout_s": 6,
    "sync.verify": "always",
}


class Served(Run):
    """A run whose servers are hurt."""

    def get_on(self, steps=2):
        """Waits for some more steps."""
        wanted = len(self.rows) + steps
        self.wait_for(lambda: len(self.rows) >= wanted)

    def rejoin(self):
        """Waits until all servers take part again."""
        self.wait_for(lambda: self.rows and self.rows[-1]["rollout/servers"] == 2)

    def supervisor(self, index):
        return next(
            p
            for p in self.children()
            if "launch.server_supervisor" in p.cmdline()
            and json.loads(p.cmdline()[-1])["server"] == index
        )

    def scheduler(self, index):
        family = self.supervisor(index).children(recursive=True)
        return next(p for p in family if p.name() == "sglang::scheduler")


@pytest.fixture(scope="module")
def battered(tmp_path_factory):
    """A run whose servers die in mid-generation, hang, are all gone for a while, and at last for good."""
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    run = Served.of(tmp_path_factory.mktemp("battered"), settings)
    try:
        run.get_on(2)
        supervisor = run.supervisor(0)
        for _ in range(4):  # until it was in a rollout, with which a step begins, and not in a sync
            victim = run.scheduler(0)
            run.get_on(1)
            victim.suspend()  # requests reach it, and are not answered
            time.sleep(1)
            supervisor.suspend()  # it cannot start again
            kill_children(supervisor)
            run.get_on(2)
            if "is lost:" in run.said:
                break
            supervisor.resume()
            run.rejoin()
        # The other hangs, until its supervisor finds out: none is left.
        run.scheduler(1).suspend()
        run.wait_for(lambda: "no rollout server is left: waiting" in run.said)
        supervisor.resume()
        run.get_on(2)
        run.rejoin()
        run.get_on(1)
        for supervisor in (run.supervisor(0), run.supervisor(1)):
            supervisor.suspend()
            kill_children(supervisor)
            supervisor.kill()
        run.end()
        yield run
    finally:
        run.launcher.kill()
        run.launcher.wait()


def kill_children(process):
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_a_run_survives_its_servers(battered):
    run = battered
    steps = run.rows
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert "is lost:" in run.said
    assert "no rollout server is left: waiting" in run.said
    assert sum(row["rollout/resent_requests"] for row in steps) >= 1
    assert {row["rollout/servers"] for row in steps} == {1, 2}


def test_no_sample_is_lost_doubled_or_of_other_weights(battered):
    run, version = battered, 0
    for row in run.rows:
        file = run.folder / "rollouts" / f"step_{row['step']:05}.leader_0.jsonl"
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        groups = [sample["group"] for sample in samples]
        assert sorted(groups) == [group for group in range(8) for _ in range(4)]
        assert {sample["version"] for sample in samples} == {version}
        for group in range(8):
            prompts = {tuple(s["prompt"]["ids"]) for s in samples if s["group"] == group}
            assert len(prompts) == 1
        version = row["sync/version"]


def test_restarted_servers_serve_what_was_learnt(battered):
    """`sync.verify: always` held all servers' log-probs against the learner's after each update."""
    run = battered
    rows = [row for row in run.rows if "sync/verified_logprob_abs_mean" in row]
    assert len(rows) > 5
    assert max(row["sync/verified_logprob_abs_mean"] for row in rows) < 0.01
    logs = [(run.folder / "logs/attempt_0" / f"server_{i}.log").read_text() for i in (0, 1)]
    for log in logs:
        assert "restart 1 of" in log
        assert log.count("healthy at") >= 2
    assert "was silent for" in logs[1]


def test_without_any_server_a_run_saves_and_ends(battered):
    run = battered
    assert run.launcher.returncode == 1
    message = run.said.split("error: ", 1)[1]
    assert "ServersGone" in message
    assert "no rollout server is left. Last lines of" in message
    assert (run.folder / "checkpoints" / f"step_{len(run.rows)}").is_dir()


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A second server, which is suspended at last: it has no supervisor."""
    recipe, folder = models.recipe(), tmp_path_factory.mktemp("victim")
    config, model = servers.ServerConfig.of(recipe), model_folder(recipe.model)
    with servers.launch_servers(config, model, folder) as (started,):
        yield started
    assert not started.scratch.exists()


def test_nan_is_the_largest_difference():
    assert largest([0.1, 0.3, 0.2]) == 0.3
    assert largest([]) is None
    for differences in ([math.nan, 0.1], [0.1, math.nan], [0.1, math.nan, 0.2]):
        assert math.isnan(largest(differences))


@pytest.mark.parametrize("begin", [0.0, 0.5])
def test_servers_get_equal_shares_of_few_requests(server, victim, begin):
    pool, asked, waits = Pool(60, begin), [], iter(())
    pool.set_servers([server.endpoint, victim.endpoint])
    for number, client in enumerate(pool.clients):

        def generate(prompts, *more, of=number, ask=client.generate):
            asked.append((of, len(prompts)))
            if next(waits, None) is not None:
                together.wait(60)
            return ask(prompts, *more)

        client.generate = generate

    def shares(count):
        asked.clear()
        assert len(pool.generate([[2, 3]] * count, Sampling(8))) == count
        return [sum(size for of, size in asked if of == number) for number in (0, 1)]

    # Threads may be late, so of nine each time.
    first = [shares(1).index(1) for _ in range(9)]
    assert sum(first) >= 5 if begin else sum(first) <= 4
    assert sorted(min(shares(4)) for _ in range(9))[4] >= 1
    waits = iter(range(2 * IN_FLIGHT))
    # Each worker has its first chunk before one has its second.
    together = threading.Barrier(2 * IN_FLIGHT)
    assert min(shares(100)) >= 2 * IN_FLIGHT


def test_hung_servers_are_excluded_and_rejoin_for_every_leader(server, victim, tmp_path):
    """Two leaders, also where they sample ahead. No supervisor: who was stopped comes back as it was, and is asked again."""
    ranks = run_ranks(
        2,
        "servers.pool_faults",
        endpoints=[asdict(server.endpoint), asdict(victim.endpoint)],
        timeout=500,
        victim=victim.process.pid,
        folder=str(model_folder(models.recipe().model)),
        registry=str(tmp_path),
    )
    both, one = [server.endpoint.url, victim.endpoint.url], [server.endpoint.url]
    for rank in ranks:
        assert rank["both"] == both
        assert rank["stopped in an update"] == one
        assert rank["awake"] == both
        original, interrupted, *undisturbed = rank["scores"]
        # The update that was interrupted and repeated left whole weights.
        for scores in undisturbed:
            assert interrupted == pytest.approx(scores, abs=0.02)
        assert interrupted != pytest.approx(original, abs=0.1)
        assert rank["stopped before the group was made"] == one
        assert rank["awake again"] == both
        assert rank["one leader had none"] == both
        assert rank["resent"] >= 2
        assert rank["served ahead"] == both
    assert [rank["newer than begun with"] for rank in ranks] == [[0], [1]]
    assert [rank["groups"] for rank in ranks] == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
    assert "all rollout servers were lost" in ranks[1]["hopeless"] == ranks[0]["hopeless"]


def test_where_servers_belong():
    tiny = {"rollout.servers": 4, "rollout.tensor_parallel": 2, "learner.ranks": 2}

    def devices(tasks, **settings):
        """Of each (task, task on its node): index, node of the server, nodes, first device."""
        wanted = {**tiny, **settings}
        recipe = load(ROOT / TINY, [f"{key}={value}" for key, value in wanted.items()])
        places = [
            place_task(
                recipe,
                {
                    "SLURM_PROCID": str(task),
                    "SLURM_LOCALID": str(local),
                    "SLURM_JOB_NUM_NODES": "1",
                },
            )
            for task, local in tasks
        ]
        assert all(where.host == "127.0.0.1" for where in places)
        return [(where.server, where.part, where.parts, where.device) for where in places]

    alone = "{learner_nodes: 1, rollout_nodes: 2, gpus_per_node: 8, time: '10'}"
    assert devices([(0, 0), (1, 1), (2, 0), (3, 1)], slurm=alone) == [
        *((0, 0, 1, 0), (1, 0, 1, 2), (2, 0, 1, 0), (3, 0, 1, 2))
    ]
    shared = "{learner_nodes: 2, gpus_per_node: 8, time: '10'}"  # one rank a node, then servers
    assert devices([(0, 0), (1, 1)], slurm=shared) == [(0, 0, 1, 1), (1, 0, 1, 3)]
    wide = {"rollout.servers": 2, "rollout.tensor_parallel": 16}
    spread = "{learner_nodes: 1, rollout_nodes: 4, gpus_per_node: 8, time: '10'}"
    assert devices([(0, 0), (1, 0), (2, 0), (3, 0)], **wide, slurm=spread) == [
        *((0, 0, 2, 0), (0, 1, 2, 0), (1, 0, 2, 0), (1, 1, 2, 0))
    ]


def test_the_nodes_of_a_server_meet_where_its_first_says(tmp_path):
    first, second = (
        ServerSupervisor(models.recipe(), tmp_path, tmp_path, Placement(7, 0, LOOPBACK, node, 2))
        for node in (0, 1)
    )
    nodes, rank, rendezvous = first._node_arguments()
    assert (nodes, rank) == ("--nnodes=2", "--node-rank=0")
    assert rendezvous.startswith("--dist-init-addr=127.0.0.1:")
    assert second._node_arguments() == ("--nnodes=2", "--node-rank=1", rendezvous)
    assert first._node_arguments()[2] != rendezvous  # started anew, it draws another port
    one = ServerSupervisor(models.recipe(), tmp_path, tmp_path, Placement(7, 0, LOOPBACK))
    assert one._node_arguments() == ()


def test_a_server_is_given_up_soon_if_it_never_comes_up_and_else_after_its_restarts(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "launch.server_supervisor.MAX_STARTUP_RETRIES", 0
    )  # it takes 10 s to find out
    rollout = {**models.recipe().rollout.model_dump(), "sglang": {"no_such_option": 1}}
    wanted = models.recipe(rollout=rollout)
    supervisor = ServerSupervisor(wanted, tmp_path, tmp_path, Placement(0, 0, LOOPBACK))
    said = []
    supervisor._say = said.append
    (tmp_path / "private").mkdir()
    with pytest.raises(SystemExit) as end:
        supervisor.run()
    assert end.value.code == 1
    assert len(said) == 1
    assert "unrecognized arguments: --no-such-option=1" in said[-1]
    assert said[-1].endswith("it never came up in 1 starts: given up")
    monkeypatch.setattr("launch.server_supervisor._MAX_PAUSE_S", 0)
    reasons = ["it died"] * (wanted.rollout.max_restarts + 1)
    supervisor._serve, supervisor.came_up = reasons.pop, True
    with pytest.raises(SystemExit):
        supervisor.run()
    assert reasons == []
    assert said[-1].endswith(f"rollout.max_restarts={wanted.rollout.max_restarts} are used up")
