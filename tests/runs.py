"""What tests of runs share: runs on forked ranks, their directories, recorded samples to learn from, and waiting."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time

import psutil
from typer.testing import CliRunner

from launch import outcome, slurm
from megatron_fp16rl.cli import app
from megatron_fp16rl.data.batch import Prompt, Sample
from megatron_fp16rl.learner.checkpoint_files import set_aside_after
from megatron_fp16rl.recipe import load
from megatron_fp16rl.rollout import discovery
from megatron_fp16rl.rollout.recording import write_samples
from megatron_fp16rl.utils.files import write_json_lines, write_text
from tests.conftest import ROOT, run_ranks

TINY = "recipes/tiny/dense-grpo-fp16.yaml"


class Run:
    """`fp16rl train` of the tiny recipe, under way, in `root`."""

    def __init__(self, root, *arguments):
        self.folder, self.output = root / "tiny-dense-grpo-fp16", root.parent / f"{root.name}.txt"
        with self.output.open("w") as file:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "megatron_fp16rl.cli", "train", *map(str, arguments)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @classmethod
    def of(cls, root, settings):
        """A new run."""
        settings = [*settings, f"trainer.run_root={root}"]
        return cls(root, TINY, *(f"--set={setting}" for setting in settings))

    @property
    def rows(self):
        return steps_of(self.folder)

    @property
    def said(self):
        return self.output.read_text()

    @property
    def attempts(self):
        return sorted(self.folder.glob("logs/attempt_*"))

    def children(self):
        return psutil.Process(self.launcher.pid).children()

    def rank(self, number):
        """A rank's process."""
        for process in self.children():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number):
                    return process
        raise AssertionError(f"there is no rank {number}")

    def wait_for(self, condition, seconds=300):
        """Unless it ends first, which is an error."""
        wait_for(
            lambda: condition() or self.launcher.poll() is not None, seconds, lambda: self.said
        )
        assert self.launcher.poll() is None, self.said

    def end(self, seconds=300):
        """Waits for it; returns its exit code and what it said."""
        try:
            return self.launcher.wait(seconds), self.said
        finally:
            self.launcher.kill()


def fp16rl(*words, code=0):
    """Runs a command in this process, with exit code `code`; returns what it printed: output, stdout, stderr."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.output, done.exception)
    return done


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
    write_json_lines(folder / "metrics.jsonl", rows)
    if jobs:
        write_text(folder / slurm.JOBS, "".join(f"{job}\n" for job in jobs))
    if ended:
        outcome.write(folder, *ended)
    return folder


def learnt(folder):
    """The rows of a run without what depends on the clock or on the transport."""
    passing = ("time/", "sync/bytes", "sync/verified")
    return [{k: v for k, v in row.items() if not k.startswith(passing)} for row in steps_of(folder)]


def make_run(folder, recipe, settings, servers=(), ranks=2, timeout=400):
    """A run in `folder`, or the rest of one that is there, on ranks that are forked: no start of theirs is paid.

    servers: that are up already, and stay so. Returns what ended each rank, "" for the run's end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / outcome.RECIPE_FILE).write_text(load(ROOT / recipe, list(settings)).to_yaml())
    for index, server in enumerate(servers):
        discovery.register(folder / outcome.SERVERS, index, server.endpoint)
    return run_ranks(ranks, "resuming.run", timeout, folder=str(folder))


def go_on(folder, at, copy, recipe, settings, servers=()):
    """As make_run, in a copy of a run, from one of its checkpoints."""
    shutil.copytree(folder, copy, symlinks=True)
    set_aside_after(copy / "checkpoints", at)
    return make_run(copy, recipe, settings, servers)


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
