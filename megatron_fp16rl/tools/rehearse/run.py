"""A rehearsal from start to end, in a folder of its own.

recipe.yaml  model/  problems.jsonl  reward.py    the small recipe, and what it names
run/                                      the run directory, as `fp16rl train` makes it
start.log  resume.log                     output of the commands
result.json                               what was verified
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_fp16rl.learner.checkpoint_files import available
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.rehearse import checks
from megatron_fp16rl.tools.rehearse.checks import Failed
from megatron_fp16rl.tools.rehearse.resume import resumed
from megatron_fp16rl.tools.rehearse.shrink import MODEL, STEPS, write
from megatron_fp16rl.utils.files import read_json, write_json
from megatron_fp16rl.utils.processes import spawn, stop, tail

_TIMEOUT_S = 1800  # of one command, on a busy machine
_EXIT_TIMEOUT_S = 30  # until the processes of a killed launcher are gone
Say = Callable[[str], None]


def rehearse(small: Recipe, folder: Path, say: Say) -> dict[str, Any]:
    """Runs all steps in `folder`, which is new. Returns the result, which names what failed if one did."""
    began = time.monotonic()
    proved: list[dict[str, Any]] = []
    reason = None
    # Killed processes cannot remove their temporary files: this folder holds them. It is not in
    # `folder`, because a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="fp16rl-", ignore_cleanup_errors=True) as temporary:
        try:
            step_began = began
            for what, figure in _steps(small, folder, temporary):
                seconds = round(time.monotonic() - step_began, 1)
                proved.append({"what": what, "figure": figure, "seconds": seconds})
                say(f"{what}: {figure} ({seconds:.0f} s)")
                step_began = time.monotonic()
        except Failed as failure:
            reason = str(failure)
    result = {
        "ok": reason is None,
        "reason": reason,
        "folder": str(folder),
        "ranks": small.learner.ranks,
        "servers": small.rollout.servers,
        "seconds": round(time.monotonic() - began, 1),
        "proved": proved,
    }
    write_json(folder / "result.json", result)
    return result


def _steps(recipe: Recipe, folder: Path, temporary: str) -> Iterator[tuple[str, str]]:
    """Takes step after step; yields what each verified, and a figure. Raises Failed."""
    learner, rollout, run = recipe.learner, recipe.rollout, folder / "run"
    limit = checks.limit_of(recipe)
    write(recipe, folder)

    # 1. Start: import the weights, train two steps, save a checkpoint.
    start = _Command(
        ["train", folder / "recipe.yaml", "--name", "run"], folder / "start.log", temporary
    )
    with start.running():
        start.wait_until(lambda: bool(available(run / "checkpoints")))
        servers = f"{rollout.servers} SGLang server(s) of {rollout.tensor_parallel}"
        yield "import, start", f"{learner.ranks} learner rank(s), {servers}"
        # 2. Kill: SIGKILL to the launcher, as when a node is lost.
        killed = start.kill()
    rows = [row for row in checks.read_steps(run) if row["step"] < STEPS]
    yield f"{STEPS} steps", checks.steps(rows, rollout.servers, limit)
    yield "kill", f"SIGKILL to the launcher: all {killed} processes are gone"

    # 3. Resume: one more step, of one update, whose result can be calculated from the checkpoint.
    batch = rollout.prompts * rollout.samples
    sets = ["--set", f"trainer.steps={STEPS + 1}", "--set", f"learner.global_batch_size={batch}"]
    again = _Command(
        ["train", "--resume", run, "--at", STEPS, *sets], folder / "resume.log", temporary
    )
    with again.running():
        again.wait_until(lambda: again.process.poll() == 0)
    yield "resume, one more step", resumed(run, STEPS, recipe)
    yield "the resumed step", checks.steps(checks.read_steps(run)[STEPS:], rollout.servers, limit)

    # 4. Export: compare with transformers on what the servers sampled from the last weights.
    samples = read_json(run / "samples" / "after.json", list)
    models = (run / "export", folder / MODEL)
    figure = checks.parity(samples, *models, rollout.temperature, limit)
    yield "export, by transformers in fp32", figure


class _Command:
    """An `fp16rl` command as a child process."""

    process: subprocess.Popen

    def __init__(self, arguments: list[object], log: Path, temporary: str) -> None:
        self.command = [sys.executable, "-m", "megatron_fp16rl.cli", *map(str, arguments)]
        self.log, self.temporary = log, temporary

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Starts the command, which does not outlive the block."""
        self.process = spawn(self.command, self.log, {"TMPDIR": self.temporary})
        try:
            yield
        finally:
            stop([self.process])

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Raises Failed if the command ends first, or takes too long."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not reached():
            code, reason = self.process.poll(), None
            if code is not None and not reached():
                reason = f"it ended with code {code}"
            elif time.monotonic() > deadline:
                reason = f"not done in {_TIMEOUT_S} s"
            if reason:
                raise Failed(f"{reason}. Last lines of {self.log}:\n{tail(self.log)}")
            time.sleep(0.1)

    def kill(self) -> int:
        """SIGKILL; returns how many processes went with it. Raises Failed if one outlives it."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        processes = {*children, *started_with(self.temporary)}
        self.process.kill()
        _, alive = psutil.wait_procs(processes, _EXIT_TIMEOUT_S)
        _, late = psutil.wait_procs(started_with(self.temporary), _EXIT_TIMEOUT_S)
        if left := {*alive, *late}:
            raise Failed(
                f"{len(left)} processes outlived their launcher by {_EXIT_TIMEOUT_S} s: {left}"
            )
        return len(processes)


def started_with(temporary: str) -> list[psutil.Process]:
    """Processes whose TMPDIR is in this folder: children inherit it, and keep it if they are orphaned."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if Path(process.environ().get("TMPDIR", "/")).is_relative_to(temporary):
                processes.append(process)
    return processes
