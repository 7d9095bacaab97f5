"""The policy of restarts, the rank to blame, and how a process learns its rank; ranks are lines of bash."""

import ast
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest

from launch import mpi, outcome, supervisor
from launch.bootstrap import BootstrapError, use_interface_towards
from launch.cause import ERROR, find, write_fault
from launch.rank import _is_final
from launch.supervisor import supervise
from megatron_fp16rl.data.rewards import RewardError
from megatron_fp16rl.learner.checkpoint_files import CheckpointError
from megatron_fp16rl.recipe import RecipeError, load
from megatron_fp16rl.rollout.rollouts import ServersGone
from megatron_fp16rl.rollout.weight_sync.publisher import SyncMismatch
from megatron_fp16rl.utils.files import Unreadable, write_json
from megatron_fp16rl.utils.processes import answer, spawn, stop
from megatron_fp16rl.utils.watchdog import Watchdog
from tests.conftest import ROOT, python

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
DONE = "echo done >private/outcome"
SAVE = "mkdir -p checkpoints; ln -s step_4 checkpoints/latest"


class Bash:
    """Starts one rank and one server; the K-th start of the rank runs the K-th line of bash."""

    def __init__(self, folder, *lines):
        self.folder, self.lines, self.servers_ended = folder, list(lines), False

    def start_servers(self, logs):
        return [spawn(["sleep", "600"], logs / "server_0.log")]

    def start_ranks(self, logs):
        command = f"cd {self.folder}; {self.lines.pop(0)}"
        return [spawn(["bash", "-c", command], logs / "rank_0.log")]

    def end_ranks(self, ranks, logs):
        return [rank.poll() for rank in ranks]

    def end_servers(self, servers):
        stop(servers, patience_s=0)
        self.servers_ended = True


@pytest.mark.parametrize(
    ("lines", "word", "reason"),
    [
        ([DONE], "done", ""),
        (["exit 3", DONE], "done", ""),
        (["echo failed >private/outcome; echo no; exit 1"], "failed", "with code 1.*\nno"),
        (["touch private/stop; exit 1"], "stopped", ""),
        (["exit 1"] * 3, "died", "max_restarts=2 are used up without a new checkpoint"),
        (["kill -9 $$"] * 3, "died", "killed by SIGKILL"),
        # Restarts are counted from the last checkpoint.
        (["exit 1", "exit 1", f"{SAVE}; exit 1", "exit 1", DONE], "done", ""),
    ],
)
def test_ranks_restart_unless_that_is_of_no_use(lines, word, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_GRACE_S", 0)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    ranks, said = Bash(tmp_path, *lines), []
    with supervisor.owning(tmp_path):
        ended = supervise(tmp_path, ranks, 2, said.append)
    assert ended.word == word
    assert re.search(reason, ended.reason, re.DOTALL), ended.reason
    assert ranks.lines == []
    assert ranks.servers_ended
    attempts = outcome.attempts(tmp_path)
    assert len(attempts) == len(lines)
    assert all((logs / "recipe.yaml").exists() for logs in attempts)
    causes = [logs for logs in attempts if (logs / "cause.json").exists()]
    assert len(causes) == len(lines) - (word == "done")
    assert sum("restart " in line for line in said) == len(lines) - 1


def test_the_rank_that_began_is_named(tmp_path):
    """A signal first, then the earliest fault; a rank's later faults do not replace its first."""
    write_fault(tmp_path, 1, ERROR, "out of memory")
    write_fault(tmp_path, 0, ERROR, "DistBackendError: [..] Connection closed by peer [10.0.0.2]")
    write_fault(tmp_path, 1, ERROR, "and more")
    # It lost a peer, so it did not begin, whatever its clock says.
    early = json.loads((tmp_path / "fault_0.json").read_text())
    write_json(tmp_path / "fault_0.json", {**early, "time": early["time"] - 3600})
    for rank, rubbish in ((3, "{"), (4, "[]"), (5, '{"rank": "x"}'), (6, "")):
        (tmp_path / f"fault_{rank}.json").write_text(rubbish)

    def cause(*codes):
        return find(tmp_path, codes).cause

    assert cause(1, 1, None) == "learner rank 1 ended with out of memory"
    assert cause(1, 1, -11) == "learner rank 2 was killed by SIGSEGV"
    # Slurm does not tell the codes: a rank that wrote nothing was killed.
    assert cause(None, None) == "learner rank 1 ended with out of memory"
    assert cause(None, None, None).startswith("learner rank 2 ended without a word: killed")


def test_errors_that_a_restart_cannot_fix_are_final():
    from megatron_fp16rl.learner.export import WeightRangeError
    from megatron_fp16rl.learner.nonfinite import NonFinite
    from megatron_fp16rl.metrics.gates import GateStop

    full = RuntimeError("the writer failed")
    full.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    kinds = (RecipeError, CheckpointError, BootstrapError, NonFinite, RewardError, ServersGone)
    kinds += (GateStop, SyncMismatch, Unreadable, WeightRangeError)
    for error in (*(kind("why") for kind in kinds), full):
        assert _is_final(error)
    for error in (RuntimeError("Connection closed by peer"), OSError(errno.EIO, "?"), KeyError()):
        assert not _is_final(error)


def test_a_watchdog_that_waits_for_ages_is_none(tmp_path):
    for ages in (math.inf, 1e12):
        watchdog = Watchdog(ages, tmp_path / "hung", lambda reason, where: None)
        watchdog.beat("what takes as long as it likes")
        with watchdog.waiting(ages):
            pass
        watchdog.close()


def test_a_job_is_supervised_by_an_older_python_too(tmp_path):
    """The host's python3 does it when the ranks run in a container. Runs where there is a 3.9."""
    listing = "import sys, launch.supervisor; print(*(getattr(m, '__file__', '') for m in sys.modules.values()))"
    loaded = map(Path, python("-c", listing).stdout.split())
    ours = [file for file in loaded if ROOT in file.parents and "site-packages" not in file.parts]
    names = {file.name for file in ours}
    assert names >= {"supervisor.py", "cause.py", "outcome.py", "lock.py", "files.py"}
    for file in ours:
        imports = [
            alias.name
            for node in ast.parse(file.read_text(), feature_version=(3, 9)).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        has_annotations = file.name == "__init__.py" or "annotations" in imports
        assert has_annotations, f"{file}: `X | None` at run time"
    installed = Path.home().glob(".pyenv/versions/3.9.*/bin/python")
    for old in [*installed, *filter(None, [shutil.which("python3.9")])]:
        if answer([old, "-V"], 20).returncode:
            continue  # a shim for what is not chosen
        arguments = [tmp_path, "--max-restarts=0", "--learner='a  b' c", "--", "false", "--overlap"]
        done = answer([old, "-S", "-m", "launch.supervisor", *arguments], 60, cwd=ROOT)
        assert (done.returncode, done.stderr) == (1, "")
        assert "outcome: died\nlearner rank 0 ended without a word" in done.stdout


def test_a_process_takes_the_interface_that_leads_to_rank_0(monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "eth7"})
    use_interface_towards("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"


def test_under_mpi_servers_go_over_the_hosts_on_devices_that_ranks_leave():
    recipe = load(RECIPE, ["rollout.servers=5", "rollout.tensor_parallel=2"])
    placed = {
        host: [(p.server, p.device) for p in mpi.place_servers(recipe, [*"aaab"], host, host)]
        for host in "ab"
    }
    assert placed == {"a": [(0, 3), (2, 5), (4, 7)], "b": [(1, 1), (3, 3)]}
