"""The command line: help with examples, exit codes, JSON, and files that are whole or absent."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools import doctor
from megatron_fp16rl.utils import cache
from tests.conftest import python

runner = CliRunner()
SUITES = "trainer.suites=[{suite: 'absent.jsonl:avg@2'}]"
COMMANDS = (
    ["train"],
    ["submit"],
    ["status"],
    ["cancel"],
    ["report"],
    ["mismatch"],
    ["eval"],
    ["doctor"],
    ["bench", "sanity"],
    ["convert", "smollm2"],
    ["recipes", "list"],
    ["recipes", "new"],
    ["recipes", "diff"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(command):
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"fp16rl {' '.join(command)}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (
            ["train", "recipes/tiny/dense-grpo-fp16.yaml", "--set", "trainer.stepz=1"],
            "did you mean 'steps'",
        ),
        (
            ["train", "recipes/tiny/smollm2-math-fp16.yaml", "--set", "task.path=absent.jsonl"],
            "there is no file absent.jsonl",
        ),
        (
            ["train", "recipes/tiny/smollm2-math-fp16.yaml", "--set", SUITES],
            "there is no file absent.jsonl",
        ),
        (["report", "nowhere"], "nowhere holds no metrics.jsonl"),
        (["eval", "nowhere", "--suite", "a.jsonl:avg@2"], "nowhere is neither a run directory nor"),
        (["eval", ".", "--suite", "a.jsonl:best"], "write FILE:METRIC"),
        (["bench", "sanity", "--only", "ppo"], "--only ppo: there are grpo, "),
    ],
)
def test_bad_usage_exits_with_2_and_says_why(arguments, message):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_missing_model_is_bad_usage_too(tmp_path):
    result = python(
        *("-m", "megatron_fp16rl.cli", "train", "recipes/tiny/smollm2-math-fp16.yaml"),
        *("--set", f"model.path={tmp_path}/absent", "--set", f"trainer.run_root={tmp_path}"),
        check=False,
    )
    assert result.returncode == 2
    assert "there is no Hugging Face folder" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("learner.ranks=4", "learner.tensor_parallel=4"), "tensor_parallel=4 does not divide"),
        (("rollout.router_replay=true",), "this qwen3 model has no experts; set it to false"),
    ],
    ids=["layout", "replay"],
)
def test_what_the_model_refuses_is_said_before_anything_starts(settings, message, tmp_path):
    result = python(
        *("-m", "megatron_fp16rl.cli", "train", "recipes/tiny/dense-grpo-fp16.yaml"),
        *(argument for setting in settings for argument in ("--set", setting)),
        *("--set", f"trainer.run_root={tmp_path}"),
        check=False,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "starting" not in result.stdout
    assert not list(tmp_path.glob("*/logs/*/*.log"))


def test_doctor():
    result = runner.invoke(app, ["doctor", "--json"])
    findings = {f["name"]: f for f in json.loads(result.output)["findings"]}
    assert set(findings) == {
        *("python", "torch", "cuda", "nccl", "megatron-core", "sglang", "transformer-engine"),
        *("apex", "mpi", "mpi4py", "slurm"),
        *("cudnn", "nvcc", "c++20", "ninja", "kernel caches"),
    }
    if not torch.cuda.is_available():
        assert findings["nvcc"]["meaning"] == "not needed without a GPU"
    assert findings["megatron-core"]["found"] == "0.16.1"
    assert findings["sglang"]["found"] == "0.5.23"
    assert all(f["meaning"] for f in findings.values())
    assert result.exit_code == 0
    assert "megatron-core" in runner.invoke(app, ["doctor"]).output


def test_doctor_warms_a_real_server():
    tiny = "recipes/tiny/dense-grpo-fp16.yaml"
    result = runner.invoke(app, ["doctor", "--warm", tiny, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["ready"]
    assert answer["warm"]["start_s"] > 0
    assert answer["warm"]["kernels"] == str(cache.kernels())
    refused = runner.invoke(app, ["doctor", "--warm", tiny, "--set", "rollout.replay=rollouts"])
    assert refused.exit_code == 2
    assert "there are no servers to start" in refused.stderr


TOOLS = {
    "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.88'",
    "c++": 'case "$*" in *--version) echo c++ 12.2;; *) cat "$2" >&2; exit "$CPP20";; esac',
    "ninja": "echo 1.13.2",
}


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """A machine with a GPU and its tools, as far as the doctor can tell."""
    for name, script in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CPP20", "0")
    monkeypatch.setenv("FP16RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    monkeypatch.setattr(doctor, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    return tmp_path


def _complaints():
    return {f.name: f.meaning for f in doctor._building() if f.needed}


def test_doctor_looks_for_what_compiles_kernels(gpu_machine, monkeypatch):
    assert _complaints() == {}
    found = {f.name: f.found for f in doctor._building()}
    assert found["cudnn"] == "9.14.0"
    assert found["nvcc"] == "release 13.0"
    assert found["kernel caches"].startswith(f"{gpu_machine}/cache/kernels on ")
    monkeypatch.setenv("CPP20", "1")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91001)
    assert "no fused attention" in _complaints()["cudnn"]
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90600)
    (gpu_machine / "ninja").unlink()
    complaints = _complaints()
    assert "int main()" in complaints["c++20"]  # what the compiler said last, here: the program
    assert "built for CUDA 12.8" in complaints["nvcc"]
    assert "no fused attention" in complaints["cudnn"]
    assert "pip install ninja" in complaints["ninja"]
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FP16RL_CACHE", "/proc/cache")
    complaints = _complaints()
    assert "/nowhere/bin/nvcc does not run" in complaints["nvcc"]
    assert "no-such-compiler does not run" in complaints["c++20"]
    assert "set FP16RL_CACHE to a folder that can" in complaints["kernel caches"]


def test_the_real_compiler_is_asked_for_cpp20(monkeypatch):
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)  # else nobody minds what it says
    compiler = doctor._compiler()
    assert compiler.found
    assert not compiler.needed, compiler.meaning
    assert doctor._error_of(["false"], 5) == "exit code 1"


def test_doctor_imports_transformer_engine(gpu_machine, monkeypatch):
    package = gpu_machine / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (gpu_machine / "transformer_engine_torch.so").touch()
    module = package / "pytorch" / "__init__.py"
    module.write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(gpu_machine)
    monkeypatch.setenv("PYTHONPATH", str(gpu_machine))
    found = doctor._accelerators()[0]
    assert found.needed
    assert "undefined symbol: _ZN3c10" in found.meaning
    module.write_text("")
    assert doctor._accelerators()[0].meaning == "layers and FusedAdam"


MOUNTS = r"""
overlay / overlay rw 0 0
tmpfs /tmp tmpfs rw 0 0
10.0.0.1@o2ib:/fs /home/me/big\040disk lustre rw 0 0
home:/export /home nfs4 rw 0 0
/dev/nvme0n1 /local ext4 rw 0 0
""".strip()


@pytest.mark.parametrize(
    ("path", "kind", "meaning"),
    [
        ("/root/.cache", "overlay", "compiled anew each time"),
        ("/tmp/x", "tmpfs", "compiled anew each time"),
        ("/home/me/.cache", "nfs4", "doctor --warm"),
        ("/home/me/big disk/cache", "lustre", "doctor --warm"),
        ("/local/me", "ext4", "each node compiles for itself"),
    ],
)
def test_doctor_says_what_becomes_of_kernels(path, kind, meaning):
    found = doctor.file_system(Path(path), MOUNTS)
    assert found == kind
    assert meaning in doctor._meaning({found})


def test_doctor_fails_where_an_engine_is_missing(monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def version(package):
        if package == "sglang":
            raise importlib.metadata.PackageNotFoundError
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    answer = json.loads(result.output)
    assert not answer["ready"]
    sglang = next(f for f in answer["findings"] if f["name"] == "sglang")
    assert sglang["needed"]
    assert "pip install" in sglang["meaning"]


def test_what_cannot_be_read_is_named_and_no_traceback(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    result = runner.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert f"error: {tmp_path}/metrics.jsonl cannot be read: Is a directory" in result.output


def test_report_of_an_unfinished_run(tmp_path):
    row = {
        "step": 0,
        "reward/mean": 0.5,
        "mismatch/logprob_abs_mean": 1e-4,
        "mismatch/seq_log_ratio_std": 1e-3,
        "mismatch/kl_k3": 1e-8,
        "fp16/loss_scale": 1024.0,
        "fp16/skipped_total": 1,
    }
    run = tmp_path / r"run$\frac$"  # a formula, if a picture took it for one
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "recipe.yaml").write_text("name: <b>unfinished</b>\n")
    result = runner.invoke(app, ["report", str(run), "--png", str(tmp_path / "o.png")])
    assert result.exit_code == 0, result.output
    page = (run / "report.html").read_text()
    assert "has not ended: 1 steps so far" in page
    assert "&lt;b&gt;unfinished" in page, "what a run wrote is text, not markup"
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_sent_around_holds_no_values_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FP16RL_TOKEN", "hush-hush")
    settings = ["slurm.environment.TOKEN=${oc.env:FP16RL_TOKEN}", "slurm.setup=['echo ${HOME}']"]
    recipe = load("recipes/tiny/dense-grpo-fp16.yaml", settings)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert (
        "hush-hush" in (tmp_path / "recipe.yaml").read_text()
    )  # a requeued job has no other source
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    assert runner.invoke(app, ["report", str(tmp_path)]).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "TOKEN: (not shown)" in page
    assert "echo ${HOME}" in page
    (tmp_path / "other.yaml").write_text(recipe.to_yaml().replace("hush-hush", "also secret"))
    files = [str(tmp_path / "recipe.yaml"), str(tmp_path / "other.yaml")]
    for how in ([], ["--json"]):
        shown = runner.invoke(app, ["recipes", "diff", *files, *how]).stdout
        assert "slurm.environment.TOKEN" in shown
        assert "secret" not in page + shown
        assert "hush-hush" not in page + shown
    command = ["train", files[0], "--set", "slurm.environment.X=${slurm.environment.TOKEN}`id`"]
    refused = runner.invoke(app, command)
    assert refused.exit_code == 2
    assert "slurm.environment.X: is taken literally" in refused.stderr
    assert "hush-hush" not in refused.stderr
