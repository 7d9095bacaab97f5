"""What this machine has, what it lacks, and what that means for a run."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from megatron_fp16rl.platform import installed
from megatron_fp16rl.platform.cpu import MEGATRON_VERSION
from megatron_fp16rl.platform.cpu_sglang import SGLANG_VERSION


@dataclass(frozen=True)
class Finding:
    """One thing looked for. `needed`: nothing runs here without it, or with this version of it."""

    name: str
    found: str | None
    meaning: str
    needed: bool = False


def examine() -> list[Finding]:
    """Looks at Python, the engines, GPUs, MPI and Slurm."""
    return [_python(), _torch(), *_gpu(), *_engines(), *_accelerators(), *_launchers()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info[:2] in ((3, 11), (3, 12))
    return Finding("python", version, "supported" if good else "want 3.11 or 3.12", not good)


def _torch() -> Finding:
    if not importlib.util.find_spec("torch"):
        return Finding("torch", None, "nothing runs; make train builds an environment", True)
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", torch.__version__, kind)


def _gpu() -> list[Finding]:
    if not importlib.util.find_spec("torch"):
        return []
    import torch

    if not torch.cuda.is_available():
        meaning = "the CPU is used: gloo, fp16 products through fp32; for small models"
        return [Finding("cuda", None, meaning), Finding("nccl", None, "collectives are gloo")]
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        Finding("cuda", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", "used"),
        Finding("nccl", nccl, "collectives"),
    ]


def _engines() -> list[Finding]:
    findings = []
    for package, wanted in (("megatron-core", MEGATRON_VERSION), ("sglang", SGLANG_VERSION)):
        found = _version(package)
        wrong = found is None or (found != wanted and not _has_cuda())
        meaning = f"want {wanted}: pip install --no-deps {package}=={wanted}" if wrong else "used"
        findings.append(Finding(package, found, meaning, wrong))
    return findings


def _accelerators() -> list[Finding]:
    te, apex = _version("transformer-engine"), _version("apex")
    foreign = apex is not None and not installed.apex()
    layers = "Megatron's local layers; Adam of apex or torch"
    if installed.transformer_engine():
        layers = "layers and FusedAdam"
    elif te:
        layers = f"not whole, it has no transformer-engine-torch: {layers}"
    return [
        Finding(
            "transformer-engine",
            te,
            layers,
        ),
        Finding(
            "apex",
            apex,
            "this is not NVIDIA's apex: pip uninstall apex"
            if foreign
            else ("FusedAdam, if Transformer Engine is missing" if apex else "optional"),
            foreign,
        ),
    ]


def _launchers() -> list[Finding]:
    mpi = _output(["mpirun", "--version"])
    slurm = _output(["sbatch", "--version"])
    mpi4py = _version("mpi4py")
    return [
        Finding("mpi", mpi, "found" if mpi else "the MPI launcher is not available here"),
        Finding("mpi4py", mpi4py, "found" if mpi4py else "the MPI launcher needs it"),
        Finding(
            "slurm", slurm, "jobs can be submitted" if slurm else "jobs cannot be submitted here"
        ),
    ]


def _has_cuda() -> bool:
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    """The first line that names a version, or None if there is no such program."""
    if shutil.which(command[0]) is None:
        return None
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    lines = (answer.stdout or answer.stderr).splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), command[0])
