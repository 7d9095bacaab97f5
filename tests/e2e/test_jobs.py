"""Whole runs as jobs on a real Slurm of four nodes, and what clusters do to jobs."""

import contextlib
import json
import stat

import psutil
import pytest

from tests.conftest import ROOT
from tests.runs import fp16rl, learnt, make_run, replay, steps_of, wait_for

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
STEPS = 40


class Job:
    """A recipe that was submitted, from the folder `where`."""

    def __init__(self, cluster, root, *settings, where=ROOT):
        self.cluster = cluster
        arguments = [f"--set={setting}" for setting in (*settings, f"trainer.run_root={root}")]
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(where):
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            done = fp16rl("submit", RECIPE, *arguments, "--json")
        (self.number,) = json.loads(done.stdout)["jobs"]
        self.folder = root / "tiny-dense-grpo-fp16"

    def steps(self):
        return steps_of(self.folder)

    def log(self):
        return "".join(
            f"== {path}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("logs/**/*"))
            if path.is_file()
        )

    def reach(self, step, seconds=120):
        wait_for(lambda: len(self.steps()) > step, seconds, self.log)

    def processes(self, kind):
        """Its learner ranks, or the supervisors of its servers."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if f"launch.{kind}" in line and str(self.folder) in line and "python" in line[0]:
                yield process

    def ranks(self):
        """The learner's processes by rank."""
        return {
            int(process.environ()["SLURM_PROCID"]): process for process in self.processes("rank")
        }

    def nodes(self):
        """The names of its nodes, none if it waits for some."""
        listed = self.cluster.run("squeue", "-h", "-j", self.number, "-o", "%N").strip()
        names = listed and self.cluster.run("scontrol", "show", "hostnames", listed)
        return names.split()

    @contextlib.contextmanager
    def held(self):
        """Its ranks stand still inside the block: it cannot end before what is done to it."""
        ranks = list(self.ranks().values())
        for rank in ranks:
            rank.suspend()
        yield
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()

    def outcome(self):
        return (self.folder / "private" / "outcome").read_text().split("\n", 1)[0]


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory):
    """Two nodes learn, two serve."""
    job = Job(
        cluster,
        tmp_path_factory.mktemp("served"),
        *("warm_start=null", "trainer.steps=3", "rollout.servers=2", "rollout.prompts=8"),
        *("rollout.samples=4", "learner.global_batch_size=16", "trainer.eval_prompts=16"),
        "slurm={learner_nodes: 2, rollout_nodes: 2, gpus_per_node: 0, time: '10', interface: ib0}",
    )
    try:
        job.reach(0, 200)
        job.environments = [
            process.environ()
            for name in ("rank", "server_supervisor")
            for process in job.processes(name)
        ]
        cluster.wait_for(job.number, "COMPLETED", timeout=240)
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"{error}\n{job.log()}") from None
    return job


def test_a_job_of_four_nodes_runs_to_its_end(served):
    assert served.outcome() == "done"
    steps = served.steps()
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert {row["rollout/servers"] for row in steps} == {2}
    assert (served.folder / "export" / "model.safetensors").exists()
    logs = served.folder / "logs" / "attempt_0"
    for name in ("rank_0.log", "rank_1.log", "supervisor_0.log", "server_1.log"):
        assert (logs / name).stat().st_size, name
    keys = [
        json.loads(path.read_text())["admin"]
        for path in (served.folder / "private").glob("server-*.json")
    ]
    assert len(keys) == 2
    everything = served.log() + (served.folder / "job.sbatch").read_text()
    assert not any(key in everything for key in keys)


def test_all_talk_over_the_interface_that_the_recipe_names(served):
    log = (served.folder / "logs" / "attempt_0" / "supervisor_0.log").read_text()
    assert f"healthy at http://{served.cluster.fast_network}." in log
    assert "127.0.0.1" not in log
    assert "0.0.0.0" not in log
    (rendezvous,) = (served.folder / "private").glob("rendezvous-*")
    assert json.loads(rendezvous.read_text())[0].startswith(served.cluster.fast_network)
    assert stat.S_IMODE(rendezvous.stat().st_mode) == 0o600
    chosen = [(e["GLOO_SOCKET_IFNAME"], e["NCCL_SOCKET_IFNAME"]) for e in served.environments]
    assert chosen == [("ib0", "=ib0")] * 4  # NCCL: that one alone, not ib01


def test_a_run_survives_a_warning_a_dead_rank_and_a_dead_node(cluster, tmp_path):
    """The same samples, learnt from in pieces, give the same numbers as in one go.

    They are named as seen from the folder in which the job is submitted.
    """
    settings = [*replay(tmp_path / "rollouts", STEPS), "checkpoint.every=5"]
    assert make_run(tmp_path / "whole", RECIPE, settings) == ["", ""]
    job = Job(
        *(cluster, tmp_path, *settings, "rollout.replay=rollouts"),
        "slurm={learner_nodes: 2, gpus_per_node: 0, time: '10', mpi: pmi2}",
        where=tmp_path,
    )
    try:
        job.reach(2)
        with job.held():
            # As at a preemption: the supervisor is asked, all ranks and server supervisors are, too.
            cluster.run("scancel", "--signal=TERM", "--full", job.number)
        wait_for(lambda: "stopped on request" in job.log(), 240, job.log)
        job.reach(len(job.steps()))  # it went back into the queue, and on
        job.ranks()[1].kill()
        wait_for(lambda: "restart 1 of 3" in job.log(), 240, job.log)
        wait_for(lambda: len(job.ranks()) == 2, 240, "both ranks")
        job.reach(len(job.steps()))
        with job.held():
            lost = job.nodes()[-1]
            cluster.kill_node(lost)
        wait_for(lambda: cluster.state_of(job.number) != "RUNNING", 240, "the loss of the node")
        cluster.wait_for(job.number, "COMPLETED", timeout=300)
        cluster.start_node(lost)  # for other tests
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"{error}\n{job.log()}") from None
    assert job.outcome() == "done"
    assert [row["step"] for row in job.steps()] == list(range(STEPS))
    assert learnt(job.folder) == learnt(tmp_path / "whole")
    assert "node1" in (job.folder / "logs" / "attempt_0" / "preflight.log").read_text()
    output = (job.folder / "logs" / "slurm.out").read_text()
    assert output.count("outcome: ") >= 2  # appended to, not written over
    causes = [json.loads(p.read_text()) for p in job.folder.glob("logs/attempt_*/cause.json")]
    assert causes
    assert all({"rank", "cause", "log"} <= set(cause) for cause in causes)
