"""Batch scripts that run, beside a stand-in for srun: other people's words and shell code in them."""

import json
import re
import string
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launch import batch_script, lock, slurm, status
from megatron_fp16rl.recipe import RecipeError, Slurm, load
from megatron_fp16rl.tools.bench import job as bench_job
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import answer
from tests.conftest import ROOT

RECIPE = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"
# Steps run at once; the job's Python says who and where it is, and ends the run.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >>"$NOTES/called"
while [[ $1 == -* ]]; do shift; done
SLURM_PROCID=3 exec "$@"
"""
PYTHON = f"""#!/bin/bash
if [ "$2" = launch.supervisor ]; then exec {sys.executable} "$@"; fi
env -0 >"$NOTES/environment.$2"
echo "I am $SLURM_PROCID"
if [ "$2" = launch.rank ]; then mkdir -p "$3/private"; echo done >"$3/private/outcome"; fi
"""


@pytest.fixture
def nodes(tmp_path):
    return stand_ins(tmp_path / "nodes")


def program(file, text):
    write_text(file, text)
    file.chmod(0o755)


def stand_ins(folder):
    """A folder of stand-ins, and of what they note."""
    for name, text in (("srun", SRUN), ("python3", PYTHON)):
        program(folder / name, text)
    return folder


def start(script, nodes, **environment):
    """Runs a script as slurmd would."""
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node1"}
    own = {"PATH": f"{nodes}:/usr/bin:/bin", "NOTES": str(nodes)}
    return answer(["bash", script], 60, env={**own, **job, **environment}, cwd="/")


def job(folder, nodes, monkeypatch, *changes):
    """A job of one node whose Python is the stand-in."""
    monkeypatch.setattr(sys, "executable", str(nodes / "python3"))
    recipe = load(RECIPE, ["slurm={gpus_per_node: 0}", "trainer.max_restarts=0", *changes])
    folder.mkdir(parents=True, exist_ok=True)
    return batch_script.write(recipe, folder)


def test_a_run_lives_in_a_folder_of_any_name(nodes, tmp_path, monkeypatch):
    name = "".join(c for c in string.printable if c.isprintable() and c not in "/\\") + " é漢"
    folder = tmp_path / name
    script = job(folder, nodes, monkeypatch)
    done = start(script, nodes)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "outcome: done\n")
    logs = folder / "logs" / "attempt_0"
    assert (
        (logs / "rank_3.log").read_text() == (logs / "supervisor_3.log").read_text() == "I am 3\n"
    )
    assert (folder / "private" / "outcome").read_text() == "done\n"
    assert f'--output="{str(folder).replace("%", "%%")}' in script.read_text().replace('\\"', '"')
    for odd in ("a\nb", "a\\b", "a\tb"):
        with pytest.raises(RecipeError, match=r"trainer\.run_root"):
            job(tmp_path / odd, nodes, monkeypatch)
        assert list((tmp_path / odd).iterdir()) == []
    for odd in ("a,b", "a:b"):
        with pytest.raises(RecipeError, match=r"slurm\.container: .* cannot be mounted"):
            job(tmp_path / odd, nodes, monkeypatch, "slurm.container={image: x}")


HOOK = 'export OLD_PROMPT="$PS1"\nexport BACKUP_HOST=$CONDA_BACKUP_HOST\nfalse\ngrep -q x /dev/null\ntrue\n'


def test_modules_and_setup_may_use_what_is_not_set(nodes, tmp_path, monkeypatch):
    write_text(tmp_path / "hook.sh", HOOK)
    program(nodes / "module", '#!/bin/bash\necho "$@" >>"$NOTES/modules"\n')
    lines = [f"source {tmp_path}/hook.sh", "[ -d /none ] && echo x"]
    lines += ["if true; then", "  false || true", "fi"]
    changes = [f"slurm.setup={json.dumps(lines)}", "slurm.modules=[cuda/13]"]
    done = start(job(tmp_path / "run", nodes, monkeypatch, *changes), nodes)
    assert (done.returncode, done.stderr) == (0, "")
    assert (nodes / "modules").read_text() == "load cuda/13\n"
    # What comes after them is held to be right again.
    assert "set -euo pipefail" in (tmp_path / "run/job.sbatch").read_text().split("fi\n", 1)[1]


LINE = r"line \d+ of job.sbatch"


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ("setup=['true', 'source /none']", 1, f"slurm.setup: {LINE}: source /none: exit code 1"),
        ("setup=['exit 7']", 7, "slurm.setup: exit 7: exit code 7"),
        ("setup=['echo ok | grep -q nothing']", 1, "grep -q nothing"),
        ("modules=[cuda/13]", 127, f"slurm.modules: {LINE}: module load cuda/13: exit code 127"),
    ],
)
def test_a_line_that_fails_is_named_and_ends_the_job(
    nodes, tmp_path, monkeypatch, changes, code, said
):
    folder = tmp_path / "run"
    script = job(folder, nodes, monkeypatch, f"slurm.{changes}")
    done = start(script, nodes)
    assert done.returncode == code
    monkeypatch.setattr(slurm, "available", lambda: False)
    (seen,) = status.read([folder])
    assert seen.state == "failed"
    assert re.search(said, seen.reason), seen.reason
    assert seen.reason in done.stderr
    if "line" in said:
        number = int(re.search(r"line (\d+)", seen.reason)[1])
        assert script.read_text().split("\n")[number - 1] in seen.reason
    assert not (nodes / "called").exists()


def test_a_job_that_fails_before_it_has_the_run_ends_nobody_elses(nodes, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    script = job(folder, nodes, monkeypatch, "slurm.setup=['exit 7']")
    with lock.alone_in(folder):
        done = start(script, nodes, FP16RL_LOCK_HELD="1")  # of the shell that submitted it
        assert done.returncode == 7
        assert "exit 7" in done.stderr
        assert not (folder / "private" / "outcome").exists()
    start(script, nodes)
    assert "exit 7" in (folder / "private" / "outcome").read_text()


def test_nodes_without_the_python_or_the_folders_of_the_login_node_say_so(
    nodes, tmp_path, monkeypatch
):
    script = job(tmp_path / "run", nodes, monkeypatch)
    (nodes / "python3").unlink()
    done = start(script, nodes)
    assert done.returncode == 1
    assert f"there is no Python {nodes}/python3 on this node" in done.stderr
    assert "slurm.container" in (tmp_path / "run/private/outcome").read_text()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    stand_ins(nodes)
    script = job(tmp_path / "other", nodes, monkeypatch)
    monkeypatch.chdir(tmp_path)
    gone.rmdir()
    done = start(script, nodes)
    assert "the folder of fp16rl submit: line " in done.stderr
    assert f"cd {gone}: exit code 1" in done.stderr


@pytest.mark.parametrize("setup", ["echo 'no end", "if true; then", "cat <<EOF", "echo )", "x=$("])
def test_setup_that_would_swallow_the_rest_is_refused(nodes, tmp_path, monkeypatch, setup):
    with pytest.raises(RecipeError, match=r"slurm\.setup: line"):
        job(tmp_path / "run", nodes, monkeypatch, f"slurm.setup={json.dumps([setup])}")


# {} is a command that must not run.
HOSTILE = (
    *("$({})", "`{}`", "; {};", "'; {}; '", '"; {}; "', "\n{}\n", "a\n#SBATCH --wrap={}\n"),
    *("| {}", "&& {}", "$'\\n'{}", "\\", "a\\", "'", '"', "${{x}}", "#", "a #b", "%j%%", "-x"),
    *("--wrap={}", "*", " a  b ", "\t{}", "\r{}", "\x00", "\x85", "\u2028{}", "é漢", "~", "!!"),
    *("{{a,b}}", "<(…)", "{{%{}%}}", "{{{{ slurm }}}}", "\ud800", "x=y", "a,b", ":", ""),
)
# Where a recipe may have it in its slurm section; and options that it adds to the usual ones.
FIELDS = {
    "gres": lambda text: {"gres": text},
    "interface": lambda text: {"interface": text},
    "time": lambda text: {"time": text},
    "image": lambda text: {"container": {"image": text}},
    "mounts": lambda text: {"container": {"image": "x", "mounts": [f"/{text}"]}},
    "modules": lambda text: {"modules": [text]},
    "environment": lambda text: {"environment": {"X": text}},
    "environment key": lambda text: {"environment": {text: "1"}},
    "options": lambda text: {"options": {"switches": text}},
    "options key": lambda text: {"options": {text: "1"}},
}
MORE_OPTIONS = dict.fromkeys(("gres", "options", "options key"), 1)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([*FIELDS]), st.sampled_from(HOSTILE) | ANY)
def test_no_value_is_run_or_asks_slurm_for_more(field, text):
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patched:
        nodes, folder, canary = stand_ins(Path(root, "nodes")), Path(root, "run"), Path(root, "c")
        (nodes / "module").symlink_to("/bin/true")
        text = text.replace("{}", f"touch {canary}").replace("{{", "{").replace("}}", "}")
        usual = job(folder, nodes, patched).read_text().count("\n#SBATCH")
        base = load(RECIPE, ["slurm={gpus_per_node: 0}", "trainer.max_restarts=0"])
        try:
            section = Slurm.model_validate({"gpus_per_node": 0, **FIELDS[field](text)})
        except ValidationError:
            return
        if field == "mounts" and ("," in text or text.count(":") > 2):
            return
        script = batch_script.write(base.model_copy(update={"slurm": section}), folder)
        lines = script.read_text().split("\n")
        head = [line for line in lines if line.startswith("#SBATCH")]
        assert len(head) == usual + MORE_OPTIONS.get(field, 0)
        assert lines[1 : len(head) + 1] == head
        done = start(script, nodes)
        assert not canary.exists()
        assert (done.returncode, done.stderr) == (0, "")
        if field == "environment":
            environment = (nodes / "environment.launch.rank").read_text().split("\0")
            assert f"X={text}" in environment


@pytest.mark.parametrize(
    ("ends", "state", "reason"),
    [
        ("exit 0", "done", ""),
        ("exit 3", "failed", "exit code 3"),
        ("echo failed >$FP16RL_JOB_FOLDER/private/outcome; exit 1", "failed", ""),
    ],
)
def test_how_a_job_that_only_runs_a_command_ended_is_shown(
    ends, state, reason, nodes, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "executable", str(nodes / "python3"))
    program(nodes / "python3", f"#!/bin/bash\necho '{{}}'\n{ends}\n")
    monkeypatch.setattr(slurm, "available", lambda: False)
    recipe = load(RECIPE, ["slurm={gpus_per_node: 0}", f"trainer.run_root={tmp_path}"])
    submitted = bench_job.submit(recipe, "selftest", 1, ["selftest", "--quick"], True)
    done = start(submitted["script"], nodes)
    assert done.returncode == int(ends.split()[-1])
    assert Path(submitted["result"]).read_text() == "{}\n"
    (folder,) = status.all_runs(tmp_path)
    (seen,) = status.read([folder])
    assert (seen.state, seen.reason, seen.faults) == (state, reason, [])
    assert seen.steps is None
