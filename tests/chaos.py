"""Ten minutes and more of faults: `python -m tests.chaos OUT [--steps N] [--seed K] [--set KEY=VALUE]`.

The tiny recipe runs twice as a job on a real Slurm of five nodes, two that learn, two that serve and a
spare: once undisturbed, once with rollout servers killed and hung, ranks killed and hung, and nodes lost,
in an order that the seed fixes. Then the ledgers are compared. The same command again does what is not done
yet. Not part of the tests: it takes half an hour.
"""

import argparse
import contextlib
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from megatron_fp16rl.recipe import load
from megatron_fp16rl.utils.files import write_json
from tests import slurm_cluster
from tests.e2e.test_jobs import Job

NODES = 5
PAUSE_S = (15, 40)
BACK_AFTER_S = 45
SETTINGS = [
    "warm_start={accuracy: 0.28, noise: 0.25, check_every: 5, "
    "optimizer: {lr: 1.0e-3, warmup_updates: 50, weight_decay: 0.01}}",
    "rollout={prompts: 32, samples: 16, servers: 2, record: true, health_timeout_s: 15}",
    "rollout.max_restarts=1000",
    "learner.global_batch_size=128",
    "sync.timeout_s=10",
    "checkpoint.every=20",
    "trainer.eval_every=50",
    "trainer.max_restarts=1000",
    "trainer.step_timeout_s=60",
    "slurm={learner_nodes: 2, rollout_nodes: 2, gpus_per_node: 0, time: '60', mpi: pmi2}",
]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
FAULTS = {  # and how often one comes, compared with the others
    "server killed": 4,
    "server hung": 2,
    "rank killed": 3,
    "rank hung": 1,
    "node lost": 2,
}


def main() -> None:
    """Runs both, and prints and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="of the recipe, in both runs")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    wanted = [*SETTINGS, f"trainer.steps={chosen.steps}", *chosen.set]
    for name in ("quiet", "chaos"):
        if not (chosen.out / f"{name}.json").exists():
            folder = chosen.out / f"slurm-{name}"
            shutil.rmtree(folder, ignore_errors=True)
            with slurm_cluster.cluster(folder, NODES) as cluster:
                run(cluster, name, chosen, wanted)
    report = compare(chosen.out)
    write_json(chosen.out / "report.json", report)
    print(json.dumps(report, indent=1))


def run(cluster: object, name: str, chosen: argparse.Namespace, wanted: list[str]) -> None:
    """One of the two, to its end; OUT/NAME.json is what was done to it, and how long it took."""
    shutil.rmtree(chosen.out / name, ignore_errors=True)  # what a run of before has left undone
    began = time.monotonic()
    job = Job(cluster, chosen.out / name, *wanted)
    faults = disturb(cluster, job, random.Random(chosen.seed)) if name == "chaos" else []
    cluster.wait_for(job.number, "COMPLETED", timeout=3600)
    done = {"folder": str(job.folder), "faults": faults, "seconds": time.monotonic() - began}
    write_json(chosen.out / f"{name}.json", done)


def disturb(cluster: object, job: Job, draw: random.Random) -> list[str]:
    """Faults, one after the other, until the run is over; returns what was done, with seconds."""
    done, lost = [], {}
    began = time.monotonic()
    job.reach(5, 300)
    furthest = 0
    while cluster.state_of(job.number) not in ENDED:
        time.sleep(draw.uniform(*PAUSE_S))
        for node, since in list(lost.items()):
            if time.monotonic() - since > BACK_AFTER_S:
                cluster.start_node(node)
                del lost[node]
        if cluster.state_of(job.number) != "RUNNING":
            continue
        if len(job.steps()) <= furthest:  # a run that gets nowhere twice in a row is ended
            continue
        fault = draw.choices(list(FAULTS), FAULTS.values())[0]
        if fault == "node lost" and lost:
            continue
        what = strike(fault, cluster, job, draw)
        if what is None:
            continue
        furthest = len(job.steps())
        if fault == "node lost":
            lost[what] = time.monotonic()
        done.append(f"{time.monotonic() - began:.0f} s: {fault}, {what}, {len(job.steps())} steps")
        print(done[-1], flush=True)
    return done


def strike(fault: str, cluster: object, job: Job, draw: random.Random) -> str | None:
    """Does it; returns to whom, or None if there is nobody."""
    if fault == "node lost":
        if not (nodes := job.nodes()):
            return None
        # Not the first, whose death takes the batch script: Slurm requeues the job all the same, but
        # only when it has given up the node.
        node = draw.choice(nodes)
        cluster.kill_node(node)
        return node
    victims = schedulers(job) if "server" in fault else job.ranks()
    if not victims:
        return None
    number = draw.choice(sorted(victims))
    try:
        victims[number].kill() if "killed" in fault else victims[number].suspend()
    except psutil.NoSuchProcess:
        return None
    return str(number)


def schedulers(job: Job) -> dict[int, psutil.Process]:
    """Those of the run's servers, by the number of their supervisor's task."""
    found = {}
    for supervisor in job.processes("server_supervisor"):
        with contextlib.suppress(psutil.Error):
            for child in supervisor.children(recursive=True):
                if child.name() == "sglang::scheduler":
                    found[int(supervisor.environ()["SLURM_PROCID"])] = child
    return found


def compare(out: Path) -> dict[str, object]:
    """What a user would ask: is every step there, once, with its prompts; is the model as good?"""
    runs = {name: json.loads((out / f"{name}.json").read_text()) for name in ("quiet", "chaos")}
    folders = {name: Path(run["folder"]) for name, run in runs.items()}
    steps = {name: _lines(folder / "metrics.jsonl") for name, folder in folders.items()}
    ledgers = {
        name: [(row["step"], row["batch/prompts_digest"], row["batch/samples"]) for row in rows]
        for name, rows in steps.items()
    }
    faults = runs["chaos"]["faults"]
    ahead = load(folders["chaos"] / "recipe.yaml").rollout.ahead
    return {
        "steps": len(steps["chaos"]),
        "ledgers_equal": ledgers["chaos"] == ledgers["quiet"],
        # With rollout.ahead above 1 what is complete first is learnt first: the same prompts, in all steps.
        "prompts_equal": len({sum(row[1] for row in rows) for rows in ledgers.values()}) == 1,
        "steps_with_lost_or_doubled_samples": [
            file.name
            for file in sorted((folders["chaos"] / "rollouts").glob("*.jsonl"))
            if not _is_whole(file, max(1, ahead))
        ],
        "faults": dict(Counter(text.split(": ")[1].split(",")[0] for text in faults)),
        "history": faults,
        "starts_of_ranks": len(list(folders["chaos"].glob("logs/attempt_*"))),
        "requests_sent_again": sum(row["rollout/resent_requests"] for row in steps["chaos"]),
        "accuracy": {
            name: json.loads((folder / "summary.json").read_text())["accuracy_after"]
            for name, folder in folders.items()
        },
        "seconds": {name: run["seconds"] for name, run in runs.items()},
    }


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _is_whole(file: Path, spread: int) -> bool:
    """Whether each prompt has its samples, of versions of the weights that lie at most so far apart.

    One step ahead of one version, or two where servers were lost while the learner learnt: those that came
    back have its newer weights.
    """
    samples = _lines(file)
    counts = Counter(sample["group"] for sample in samples)
    versions = {v for sample in samples for v in np.atleast_1d(sample["version"]).tolist()}
    return set(counts.values()) == {16} and max(versions) - min(versions) <= spread


if __name__ == "__main__":
    main()
