"""What tests of runs share: their directories, recorded samples to learn from, the steps made, and waiting."""

import json
import random
import time

from launch import outcome, slurm
from megatron_fp16rl.data.batch import Prompt, Sample
from megatron_fp16rl.rollout.recording import write_samples
from megatron_fp16rl.utils.files import write_text


def wait_for(condition, seconds, what):
    """what: did not happen if time runs out; a function is called then."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            text = what() if callable(what) else what
            raise AssertionError(f"not within {seconds} s: {text}")
        time.sleep(0.02)


def steps_of(folder):
    """The rows of metrics.jsonl; a line that is being written is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_folder(folder, *rows, recipe="trainer: {steps: 4}\n", jobs=(), ended=None):
    """A run's directory as it is left: rows of metrics, numbers of Slurm jobs, (word, reason) of its end."""
    write_text(folder / "recipe.yaml", recipe)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if jobs:
        write_text(folder / slurm.JOBS, "".join(f"{job}\n" for job in jobs))
    if ended:
        outcome.write(folder, *ended)
    return folder


def replay(folder, steps):
    """Writes random responses to two prompts a step; returns settings of a run that needs no server."""
    draw = random.Random(0)
    for step in range(steps):
        samples = []
        for group in range(2):
            prompt = Prompt("1+2=", [3, 12, 4, 13], "3")
            for reward in (0.0, 1.0, 0.0, 1.0):
                ids = [draw.randrange(2, 12) for _ in range(4)]
                samples.append(Sample(prompt, group, ids, [-2.3] * 4, "", False, step, reward))
        write_samples(folder, step, 0, samples)
    return [
        *(f"rollout.replay={folder}", f"trainer.steps={steps}", "warm_start=null"),
        *("rollout.prompts=2", "rollout.samples=4", "learner.global_batch_size=8"),
        "learner.optimizer.decay=constant",  # a run may be made shorter
    ]
