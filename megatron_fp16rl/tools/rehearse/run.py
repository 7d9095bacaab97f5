"""A rehearsal from start to end, in a folder of its own.

recipe.yaml  model/  problems.jsonl  reward.py    what is rehearsed, and with what
run/                                              the run's directory, as fp16rl train makes it
start.log  resume.log  convert.log                what the commands said
converted/  before/                               the last checkpoint, read on one rank, and the first
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from megatron_fp16rl.learner.checkpoint_files import available
from megatron_fp16rl.tools.rehearse import checks, materials
from megatron_fp16rl.tools.rehearse.checks import Failed
from megatron_fp16rl.tools.rehearse.child import AND
from megatron_fp16rl.tools.rehearse.resume import resumed
from megatron_fp16rl.tools.rehearse.shrink import STEPS, Small
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.processes import spawn, stop, tail

RUN = "run"
_LIMIT_S = 1800  # of one command, on a busy machine
_GONE_S = 30
_WARNING = re.compile(r"\s*$|\s|.+Warning: ")
Say = Callable[[str], None]


@dataclass
class Rehearsal:
    """What came of it. reason: why it failed; None if everything was proved."""

    folder: str
    small: Small
    proved: list[dict[str, object]] = field(default_factory=list)
    seconds: float = 0.0
    reason: str | None = None

    def as_json(self) -> dict[str, object]:
        """One object for programs; result.json in the folder is the same."""
        recipe = self.small.recipe
        return {
            "ok": self.reason is None,
            "reason": self.reason,
            "folder": self.folder,
            "family": self.small.config["model_type"],
            "ranks": recipe.learner.ranks,
            "servers": recipe.rollout.servers,
            "seconds": round(self.seconds, 1),
            "proved": self.proved,
            "folded": [asdict(fold) for fold in self.small.folded],
            "left_out": self.small.left_out,
            "only_gpus": only_gpus(self.small),
        }


def rehearse(small: Small, folder: Path, say: Say) -> Rehearsal:
    """Runs every step in `folder`, which is new; what fails is in the result, with the logs' names."""
    result = Rehearsal(str(folder), small)
    began = time.monotonic()
    # What is killed cannot tidy up: its temporary files go here. Not in `folder`, whose path may be too
    # long for a socket's.
    with tempfile.TemporaryDirectory(prefix="fp16rl-", ignore_cleanup_errors=True) as temporary:
        try:
            _Stage(small, folder, say, result, {"TMPDIR": temporary}).run()
        except Failed as failure:
            result.reason = str(failure)
    result.seconds = time.monotonic() - began
    write_json(folder / "result.json", result.as_json())
    return result


def only_gpus(small: Small) -> list[str]:
    """What no machine without GPUs can tell about a recipe."""
    has_experts = any(small.config.get(n) for n in ("num_experts", "n_routed_experts"))
    grouped = " and grouped GEMM" if has_experts else ""
    return [
        "memory at full size (fp16rl plan reckons it), and speed",
        f"NCCL, Transformer Engine's kernels{grouped}, SGLang's CUDA kernels and graphs",
        "the range of real weights and activations in fp16, and learning itself",
        "long sequences and full batches",
        "Slurm, several nodes and their network (fp16rl submit, its preflight)",
    ]


def started_with(temporary: str) -> list[psutil.Process]:
    """All processes with this TMPDIR, or one inside, whoever is their parent now: children inherit it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended, or another user's
            if Path(process.environ().get("TMPDIR", "/")).is_relative_to(temporary):
                found.append(process)
    return found


class _Stage:
    """The steps, each of which says what it proved."""

    def __init__(
        self,
        small: Small,
        folder: Path,
        say: Say,
        result: Rehearsal,
        environment: dict[str, str],
    ) -> None:
        self.small, self.folder, self.say, self.result = small, folder, say, result
        self.environment = environment
        self.recipe, self.run_folder = small.recipe, folder / RUN
        self.allowed = checks.Tolerance.of(small.recipe, small.config)
        self._began = time.monotonic()
        self._told: dict[Path, int] = {}  # lines of each log

    def run(self) -> None:
        """Raises Failed at the first thing that does not hold."""
        tensors = materials.write(self.small, self.folder)
        kind = self.small.config["model_type"]
        self._proved("a random model of the family", f"{kind}, {tensors} tensors in bf16")
        self._start_and_kill()
        self._resume()
        self._export(tensors)

    def _start_and_kill(self) -> None:
        command = ("train", self.folder / "recipe.yaml", "--name", RUN)
        with self._command("start", *command) as (child, log):
            self._until(child, log, lambda: bool(checks.rows(self.run_folder)))
            learner, rollout = self.recipe.learner, self.recipe.rollout
            self._proved(
                "import, start",
                f"bf16 -> {self.recipe.precision.dtype}, {learner.ranks} learner rank(s), "
                f"{rollout.servers} SGLang server(s) of {rollout.tensor_parallel}",
            )
            saved = self.run_folder / "checkpoints"
            self._until(child, log, lambda: bool(available(saved)))
            count = self._kill(child)
        first = [row for row in checks.rows(self.run_folder) if row["step"] < STEPS]
        sampled = checks.sampled(first, rollout.servers, self.allowed)
        self._proved(f"{STEPS} steps", f"{checks.learnt(first)}, {sampled}")
        self._proved("sync, verified after the steps", checks.sync(first, self.allowed))
        if self.recipe.gates:
            self._proved("gates", checks.gates(first, self.recipe.gates))
        self._checkpoint()
        self._proved("kill", f"SIGKILL to the launcher: all {count} processes are gone")

    def _kill(self, child: subprocess.Popen) -> int:
        """Kills a launcher; returns how many processes went with it. Raises Failed if one is left."""
        temporary = self.environment["TMPDIR"]
        everyone = {*psutil.Process(child.pid).children(recursive=True), *started_with(temporary)}
        child.kill()
        _, alive = psutil.wait_procs(everyone, _GONE_S)
        _, strangers = psutil.wait_procs(started_with(temporary), _GONE_S)  # who began meanwhile
        if left := {*alive, *strangers}:
            raise Failed(f"{len(left)} processes outlived their launcher by {_GONE_S} s: {left}")
        return len(everyone)

    def _checkpoint(self) -> None:
        found, wanted = checks.checkpoint(self.run_folder, STEPS), self.recipe.learner.ranks
        if (ranks := checks.ranks(found)) != wanted:
            raise Failed(f"{found.path} was written by {ranks} ranks, not {wanted}")
        size = sum(file["bytes"] for file in found.files().values())
        said = f"{len(found.files())} files of {ranks} rank(s), {size / 2**20:.1f} MiB, all whole"
        self._proved("checkpoint", said)

    def _resume(self) -> None:
        more = ("--resume", self.run_folder, "--at", STEPS, "--set", f"trainer.steps={STEPS + 1}")
        with self._command("resume", "train", *more) as (child, log):
            self._done(child, log)
        rows = checks.steps(self.run_folder, STEPS + 1)
        self._proved("resume, one more step", resumed(self.run_folder, STEPS, self.recipe))
        self._proved("sync, verified after it", checks.sync(rows[STEPS:], self.allowed))

    def _export(self, tensors: int) -> None:
        saved, rollout = self.run_folder / "checkpoints", self.recipe.rollout
        like, before, converted = (self.folder / n for n in ("model", "before", "converted"))
        command = ("convert", "to-hf", saved / f"step_{STEPS}", before, AND)
        command += ("convert", "to-hf", saved / f"step_{STEPS + 1}", converted)
        known = (like, rollout.temperature, self.allowed)
        with self._command("convert", *command) as (child, log):
            exported = checks.parity(self.run_folder, *known, version=STEPS + 1)
            self._done(child, log)
        again = checks.resampled(self.run_folder, STEPS, before, *known)
        self._proved("the resumed step sampled from the checkpoint's weights", str(again))
        export, dtype = self.run_folder / "export", self.recipe.precision.dtype
        count, size = checks.export(export, like, converted, dtype)
        said = f"{count} of {tensors} tensors in {dtype}, {size:,} bytes, those of the checkpoint"
        self._proved("export", said)
        self._proved("parity with transformers in fp32", str(exported))

    def _proved(self, what: str, figure: str) -> None:
        now = time.monotonic()
        seconds = round(now - self._began, 1)
        self._began = now
        self.result.proved.append({"what": what, "figure": figure, "seconds": seconds})
        self.say(f"{what}: {figure} ({seconds:.0f} s)")

    @contextlib.contextmanager
    def _command(self, name: str, *arguments: object) -> Iterator[tuple[subprocess.Popen, Path]]:
        """A command of ours, which does not outlive the block, and its log."""
        command = [
            sys.executable,
            "-m",
            "megatron_fp16rl.tools.rehearse.child",
            *map(str, arguments),
        ]
        log = self.folder / f"{name}.log"
        child = spawn(command, log, self.environment)
        try:
            yield child, log
        finally:
            stop([child])

    def _until(self, child: subprocess.Popen, log: Path, reached: Callable[[], bool]) -> None:
        """Waits until it is `reached`, and says what the command says. Raises Failed if it ends."""
        deadline = time.monotonic() + _LIMIT_S
        while not reached():
            self._pass_on(log)
            code = child.poll()
            if code is not None and not reached():
                raise Failed(f"it ended with code {code}. Last lines of {log}:\n{tail(log)}")
            if time.monotonic() > deadline:
                raise Failed(f"no end after {_LIMIT_S} s. Last lines of {log}:\n{tail(log)}")
            time.sleep(0.1)

    def _done(self, child: subprocess.Popen, log: Path) -> None:
        """Waits for a command that is to end well. Raises Failed if it does not."""
        self._until(child, log, lambda: child.poll() == 0)

    def _pass_on(self, log: Path) -> None:
        """Says the lines that a log has got since the last time, without Python's warnings."""
        lines = log.read_text(errors="replace").splitlines(keepends=True)
        for line in lines[self._told.get(log, 0) :]:
            if line.endswith("\n"):
                self._told[log] = self._told.get(log, 0) + 1
                if not _WARNING.match(line):
                    self.say(f"  {line.rstrip()}")
