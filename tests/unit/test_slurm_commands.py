"""What Slurm's commands say, on sites where they say more, less or nothing; stand-ins for them."""

import json
import os
import shlex

import pytest

from launch import batch_script, sbatch, slurm, status, sweep
from megatron_fp16rl.utils.errors import ExplainedError
from megatron_fp16rl.utils.files import write_text
from tests.conftest import ROOT
from tests.runs import fp16rl, run_folder
from tests.unit.test_scripts import program

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
SOCKET = "slurm_load_jobs error: Socket timed out on send/recv operation"
RUNNING = "RUNNING|node1|9:00|None"


class Site:
    """Slurm's commands, each of which does what a test writes; they note how they were called."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = folder / "calls"
        for command in ("sbatch", "squeue", "scancel", "scontrol"):
            self.does(command, "")

    def does(self, command, lines):
        """lines: of bash; $jobs are those that squeue was asked about."""
        jobs = 'for word; do [ "$last" = -j ] && jobs=${word//,/ }; last=$word; done'
        note = f'echo {command} "$@" >>{self.calls}'
        program(self.folder / command, f"#!/bin/bash\n{note}\n{jobs}\n{lines}\n")

    def called(self, command):
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line.removeprefix(f"{command} ") for line in lines if line.startswith(command)]


@pytest.fixture
def site(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Site(tmp_path / "bin")


def run_of(root, name, *jobs, row=None, ended=None):
    """A run that was submitted as these jobs."""
    folder = root / "runs" / name
    write_text(folder / batch_script.SCRIPT, "#!/bin/bash\n#SBATCH --time=10\n")
    return run_folder(folder, *([row] if row else []), jobs=jobs, ended=ended)


@pytest.mark.parametrize(
    "says",
    [
        "echo 'sbatch: no account given, using teamx' >&2; echo 42",
        "echo; echo ' -> 3 checks of your job: all well'; echo 42; echo 'teamx has 100 hours left'",
        "printf '\\xff\\xfe\\n' >&2; echo '42;north'",
    ],
)
def test_a_jobs_number_is_taken_from_stdout_alone_and_the_rest_is_shown(
    site, tmp_path, capfd, says
):
    site.does("sbatch", says)
    site.does(
        "squeue", f"echo 'a banner | of the site'; for j in $jobs; do echo \"$j|{RUNNING}\"; done"
    )
    folder = run_of(tmp_path, "mine")
    assert slurm.submit(folder / batch_script.SCRIPT) == "42"
    assert slurm.submit(folder / batch_script.SCRIPT) == "42"
    assert slurm.jobs(folder) == ["42"] * 2
    script = (folder / batch_script.SCRIPT).read_text()
    assert (folder / "logs" / "job_42.sbatch").read_text() == script  # what a resume writes anew
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("teamx" in says) == ("teamx" in shown.err)
    (seen,) = status.read([folder])
    assert (seen.state, list(seen.jobs)) == ("running", ["42"])
    assert status.find("42", tmp_path / "runs") == folder
    assert status.cancel(folder, save=True) == ["job 42 is to save and end"]
    assert status.cancel(folder, save=False) == ["job 42 is cancelled"]
    assert site.called("scancel") == ["--batch --signal=USR1 42", "42"]


def test_a_job_whose_number_nobody_knows_is_not_submitted_twice(site, tmp_path, monkeypatch):
    folder = run_of(tmp_path, "mine")
    site.does("sbatch", "echo your job is in good hands")
    with pytest.raises(slurm.SlurmError, match=r"good hands.*squeue --me before you submit again"):
        slurm.submit(folder / batch_script.SCRIPT)
    site.does("sbatch", "exec sleep 600")
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.5)
    with pytest.raises(slurm.SlurmError, match=r"sbatch did not answer.*squeue --me"):
        slurm.submit(folder / batch_script.SCRIPT)
    assert slurm.jobs(folder) == []


def test_of_a_chain_that_breaks_off_the_jobs_in_the_queue_are_named(site, tmp_path):
    site.does(
        "sbatch",
        f'case "$*" in *test-only*) exit;; esac\n[ -e {tmp_path}/one ] && exit 1\n'
        f"touch {tmp_path}/one; echo 42",
    )
    settings = ("slurm={gpus_per_node: 0}", "warm_start=null", f"trainer.run_root={tmp_path}/runs")
    words = [f"--set={setting}" for setting in settings]
    done = fp16rl("submit", RECIPE, *words, "--chain", 3, code=1)
    assert "job 42 is in the queue" in done.stderr
    assert slurm.jobs(tmp_path / "runs" / "tiny-dense-grpo-fp16") == ["42"]


def test_where_slurm_is_silent_the_runs_directories_speak(site, tmp_path):
    site.does("squeue", f"echo '{SOCKET}' >&2; exit 1")
    said = "Socket timed out"
    row = {"step": 2, "time/step_s": 1.0, "reward/mean": 0.25}
    runs = {
        "done": (run_of(tmp_path, "done", 71, row=row, ended=("done",)), True),
        "stopped": (run_of(tmp_path, "stopped", 72, row=row, ended=("stopped",)), False),
        "unknown": (run_of(tmp_path, "at-work", 73, row=row), False),
        "died": (run_of(tmp_path, "local", row=row), True),
    }
    seen = status.read([folder for folder, _ in runs.values()])
    for one, (state, (folder, is_over)) in zip(seen, runs.items(), strict=True):
        assert (one.state, one.steps_done, one.is_over) == (state, 3, is_over)
        assert (said in (one.slurm_error or "")) == bool(slurm.jobs(folder))
    root = ("--root", tmp_path / "runs")
    listed = fp16rl("status", *root)
    assert listed.output.count("Slurm is silent: squeue") == 3
    one = fp16rl("status", "at-work", *root, "--json")
    assert said in json.loads(one.output)["slurm_error"]
    assert said in fp16rl("cancel", "at-work", *root, code=1).stderr


def test_a_watch_outlasts_silence(site, tmp_path):
    folder = run_of(tmp_path, "mine", 71, row={"step": 0, "time/step_s": 1.0})
    site.does(
        "squeue",
        f"n=$(wc -l <{site.calls})\n"
        f"if [ $n -eq 2 ]; then echo '{SOCKET}' >&2; exit 1; fi\n"
        f'if [ $n -lt 4 ]; then echo "71|{RUNNING}"; exit; fi\n'
        f"mkdir -p {folder}/private; echo done >{folder}/private/outcome\n"
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    )
    states = [(seen.state, bool(seen.slurm_error)) for (seen,) in status.follow([folder], 0)]
    # What ended the run was written while the last but one was asked.
    assert states == [("running", False), ("unknown", True), ("running", False), ("done", False)]


def test_one_job_that_cannot_be_cancelled_spares_no_other(site, tmp_path):
    site.does("squeue", f'for j in $jobs; do echo "$j|{RUNNING}"; done')
    site.does(
        "scancel",
        '[ "$1" = 1 ] && { echo "scancel: error: Access denied" >&2; exit 1; }\n'
        '[ "$1" = 2 ] && { echo "Job/step already completing or completed" >&2; exit 1; }\ntrue',
    )
    runs = [run_of(tmp_path, f"run-{job}", job) for job in (1, 2, 3)]
    write_text(runs[0].parent / sweep.AXES, "")
    with pytest.raises(ExplainedError, match=r"(?s)job 1: .*Access denied.*job 3 is cancelled"):
        status.cancel(runs[0].parent, save=False)
    assert site.called("scancel") == ["1", "2", "3"]


def test_states_of_jobs(site, tmp_path):
    folder = run_of(tmp_path, "mine", 42)
    for line, state, alive in (
        ("PENDING||10:00|Nodes required for job are DOWN, or reserved|for jobs", "queued", True),
        ("REQUEUE_HOLD||10:00|launch failed requeued held", "queued", True),
        ("EXPEDITING|node1|0:00|None", "running", True),  # of a later version
        ("OUT_OF_MEMORY|node1|0:00|OutOfMemory", "died", False),
    ):
        site.does("squeue", f"echo {shlex.quote(f'42|{line}')}")
        (seen,) = status.read([folder])
        assert (seen.state, "42" in seen.jobs) == (state, alive)
    assert seen.reason == "job 42: OUT_OF_MEMORY (OutOfMemory)"


def test_the_shells_own_settings_neither_hide_jobs_nor_ask_back(site, tmp_path, monkeypatch):
    site.does("squeue", f'env >>{tmp_path}/seen; for j in $jobs; do echo "$j|{RUNNING}"; done')
    site.does("scancel", f"env >>{tmp_path}/seen; cat >>{tmp_path}/typed")
    for name in ("SQUEUE_PARTITION", "SQUEUE_USERS", "SCANCEL_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    status.cancel(run_of(tmp_path, "mine", 42), save=False)
    seen = (tmp_path / "seen").read_text()
    assert "SQUEUE_" not in seen
    assert "SCANCEL_" not in seen
    assert (tmp_path / "typed").read_text() == ""


def test_the_shells_own_settings_do_not_change_the_job():
    script = "#!/bin/bash\n#SBATCH --time=10\n#SBATCH --requeue\n#SBATCH --account=mine\n"
    kept = {"SBATCH_PARTITION": "debug", "HOME": "/h"}
    dropped = ("TIMELIMIT", "ACCOUNT", "NO_REQUEUE", "ARRAY_INX", "EXPORT", "WCKEY")
    shell = {**kept, **{f"SBATCH_{name}": "1" for name in dropped}}
    assert sbatch.shell(shell, script) == kept
    outside = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CPU_BIND": "cores"}
    assert sbatch.shell(outside, script) == outside
    inside = {**outside, "SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "4", "SLURM_HET_SIZE": "2"}
    assert sbatch.shell(inside, script) == {"SLURM_CONF": "/etc/slurm.conf"}


def test_without_sbatch_it_is_said_where_to_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        slurm.SlurmError, match="sbatch is not on this machine: submit from a cluster"
    ):
        slurm.check("#!/bin/bash")
