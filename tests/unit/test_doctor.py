"""`fp16rl doctor`: what a machine has and lacks, and what that means."""

import importlib.metadata
import json

import pytest
import torch
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.tools import doctor

runner = CliRunner()


def test_doctor():
    result = runner.invoke(app, ["doctor", "--json"])
    findings = {f["name"]: f for f in json.loads(result.output)["findings"]}
    assert set(findings) == {
        *("python", "torch", "cuda", "megatron-core", "sglang", "transformer-engine"),
        *("apex", "mpi4py", "slurm"),
        *("cudnn", "nvcc", "c++20", "ninja", "kernel caches"),
    }
    if not torch.cuda.is_available():
        assert findings["nvcc"]["meaning"] == "not needed without a GPU"
    assert findings["megatron-core"]["found"] == "0.19.2"
    assert findings["sglang"]["found"] == "0.5.23"
    assert all(f["meaning"] for f in findings.values())
    assert result.exit_code == 0
    assert "megatron-core" in runner.invoke(app, ["doctor"]).output


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
    kernels = [check for check in doctor._CHECKS if check.of_a_gpu]
    return {f.name: f.meaning for f in map(doctor._examine, kernels) if f.needed}


def test_doctor_looks_for_what_compiles_kernels(gpu_machine, monkeypatch):
    assert _complaints() == {}
    assert doctor._cudnn() == ("9.14.0", None)
    assert doctor._nvcc() == ("release 13.0", None)
    assert doctor._kernel_caches() == (f"{gpu_machine}/cache/kernels", None)
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


def test_the_real_compiler_is_asked_for_cpp20():
    version, complaint = doctor._compiler()
    assert version
    assert complaint is None
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
    monkeypatch.setattr(doctor.installed, "version", lambda _: "2.11.0")
    assert "undefined symbol: _ZN3c10" in doctor._transformer_engine()[1]
    module.write_text("")
    assert doctor._transformer_engine() == ("2.11.0", None)


def test_doctor_fails_where_an_engine_is_missing(monkeypatch):
    version = importlib.metadata.version
    missing = "sglang-of-another-name"
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version(missing if name == "sglang" else name)
    )
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    answer = json.loads(result.output)
    assert not answer["ready"]
    (sglang,) = (finding for finding in answer["findings"] if finding["name"] == "sglang")
    assert sglang["needed"]
    assert "pip install" in sglang["meaning"]
