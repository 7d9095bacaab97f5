"""Whole runs as jobs on a real Slurm of four nodes, and what clusters do to jobs."""

import json
import signal
import stat

import psutil
import pytest

from tests.conftest import ROOT, python
from tests.runs import steps_of, wait_for

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
STEPS = 60
COMPARED = ("step", "reward/mean", "loss/policy", "grad/norm", "fp16/loss_scale", "lr")
SMALL = [
    "warm_start=null",
    f"trainer.steps={STEPS}",
    "trainer.eval_every=100000",
    "rollout.prompts=8",
    "rollout.samples=4",
    "learner.global_batch_size=16",
    "checkpoint.every=10",
]


class Job:
    """A recipe that was submitted, from the folder `where`."""

    def __init__(self, cluster, root, *settings, where=ROOT):
        self.cluster = cluster
        arguments = [f"--set={setting}" for setting in (*SMALL, *settings)]
        done = python(
            *("-m", "megatron_fp16rl.cli", "submit", RECIPE, *arguments, "--json"),
            f"--set=trainer.run_root={root}",
            environment=cluster.environment,
            cwd=where,
        )
        answer = json.loads(done.stdout)
        (self.number,) = answer["jobs"]
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

    def outcome(self):
        return (self.folder / "private" / "outcome").read_text().split("\n", 1)[0]


@pytest.fixture(scope="module")
def recorded(cluster, tmp_path_factory):
    """Two nodes learn, two serve; every sample is kept."""
    job = Job(
        cluster,
        tmp_path_factory.mktemp("recorded"),
        "rollout.servers=2",
        "rollout.record=true",
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


def test_a_job_of_four_nodes_runs_to_its_end(recorded):
    assert recorded.outcome() == "done"
    steps = recorded.steps()
    assert [row["step"] for row in steps] == list(range(STEPS))
    assert {row["rollout/servers"] for row in steps} == {2}
    assert (recorded.folder / "export" / "model.safetensors").exists()
    logs = recorded.folder / "logs" / "attempt_0"
    for name in ("rank_0.log", "rank_1.log", "supervisor_0.log", "server_1.log"):
        assert (logs / name).stat().st_size, name
    keys = [
        json.loads(path.read_text())["admin"]
        for path in (recorded.folder / "private").glob("server-*.json")
    ]
    assert len(keys) == 2
    everything = recorded.log() + (recorded.folder / "job.sbatch").read_text()
    assert not any(key in everything for key in keys)


def test_all_talk_over_the_interface_that_the_recipe_names(recorded):
    log = (recorded.folder / "logs" / "attempt_0" / "supervisor_0.log").read_text()
    assert f"healthy at http://{recorded.cluster.fast_network}." in log
    assert "127.0.0.1" not in log
    assert "0.0.0.0" not in log
    (rendezvous,) = (recorded.folder / "private").glob("rendezvous-*")
    assert json.loads(rendezvous.read_text())[0].startswith(recorded.cluster.fast_network)
    assert stat.S_IMODE(rendezvous.stat().st_mode) == 0o600
    chosen = [(e["GLOO_SOCKET_IFNAME"], e["NCCL_SOCKET_IFNAME"]) for e in recorded.environments]
    assert chosen == [("ib0", "=ib0")] * 4  # NCCL: that one alone, not ib01


def test_a_run_survives_a_warning_a_dead_rank_and_a_dead_node(recorded, cluster, tmp_path):
    """The same samples, learnt from in pieces, give the same numbers as in one go.

    The recorded ones are named as seen from the folder in which the job is submitted.
    """
    job = Job(
        cluster,
        tmp_path,
        "rollout.replay=rollouts",
        "slurm={learner_nodes: 2, gpus_per_node: 0, time: '10', mpi: pmi2}",
        where=recorded.folder,
    )
    try:
        job.reach(5)
        # As at a preemption: the supervisor is asked, all ranks and server supervisors are, too.
        cluster.run("scancel", "--signal=TERM", "--full", job.number)
        wait_for(lambda: "stopped on request" in job.log(), 240, job.log)
        job.reach(len(job.steps()) + 2)  # it went back into the queue, and on
        job.ranks()[1].send_signal(signal.SIGKILL)
        wait_for(lambda: "restart 1 of 3" in job.log(), 240, job.log)
        wait_for(lambda: len(job.ranks()) == 2, 240, "both ranks")
        done = len(job.steps())
        job.reach(done + 3)
        lost = job_nodes(cluster, job)[-1]
        cluster.kill_node(lost)
        wait_for(lambda: cluster.state_of(job.number) != "RUNNING", 240, "the loss of the node")
        cluster.wait_for(job.number, "COMPLETED", timeout=300)
        cluster.start_node(lost)  # for other tests
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"{error}\n{job.log()}") from None
    assert job.outcome() == "done"
    assert [row["step"] for row in job.steps()] == list(range(STEPS))
    for mine, whole in zip(job.steps(), recorded.steps(), strict=True):
        assert {k: mine[k] for k in COMPARED} == {k: whole[k] for k in COMPARED}
    assert "node1" in (job.folder / "logs" / "attempt_0" / "preflight.log").read_text()
    output = (job.folder / "logs" / "slurm.out").read_text()
    assert output.count("outcome: ") >= 2  # appended to, not written over
    causes = [json.loads(p.read_text()) for p in job.folder.glob("logs/attempt_*/cause.json")]
    assert causes
    assert all({"rank", "cause", "log"} <= set(cause) for cause in causes)


def job_nodes(cluster, job):
    listed = cluster.run("squeue", "-h", "-j", job.number, "-o", "%N").strip()
    return cluster.run("scontrol", "show", "hostnames", listed).split()
