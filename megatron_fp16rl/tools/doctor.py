"""What a run needs of this machine: one table of checks."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fp16rl.platform import installed
from megatron_fp16rl.platform.cpu import MEGATRON_VERSION
from megatron_fp16rl.platform.cpu_sglang import SGLANG_VERSION
from megatron_fp16rl.platform.cuda import cudnn_name
from megatron_fp16rl.utils import cache
from megatron_fp16rl.utils.processes import answer, search_path

_CPP20 = "#include <concepts>\nint main() { return std::same_as<int, int> ? 0 : 1; }\n"
_IMPORT_S, _COMPILE_S, _VERSION_S = 300, 60, 20
# In these TE 2.18 finds bugs and leaves fused attention out (common/fused_attn/fused_attn.cpp).
_BAD_CUDNN = (91000, 91001)
_OLDEST_CUDNN = 90700  # with which it knows all GPUs that have CUDA 13

# A version or a name, and a complaint; None where there is none.
Look = tuple[str | None, str | None]


@dataclass(frozen=True)
class Check:
    """use: what it is for. without: what its absence means, if that is no fault."""

    name: str
    look: Callable[[], Look]
    use: str
    without: str = ""
    of_a_gpu: bool = False


@dataclass(frozen=True)
class Finding:
    """The result of a check. needed: nothing runs here without it, or with this version of it."""

    name: str
    found: str | None
    meaning: str
    needed: bool = False


def examine() -> list[Finding]:
    """Looks at Python, the engines, GPUs, what compiles kernels for them, MPI and Slurm."""
    return [_examine(check) for check in _CHECKS]


def _examine(check: Check) -> Finding:
    version, complaint = check.look()
    if check.of_a_gpu and not _has_cuda():
        return Finding(check.name, version, "not needed without a GPU")
    if complaint is not None:
        return Finding(check.name, version, complaint, True)
    return Finding(check.name, version, check.without if version is None else check.use)


def _python() -> Look:
    version = ".".join(map(str, sys.version_info[:3]))
    return version, None if sys.version_info[:2] in ((3, 11), (3, 12)) else "want 3.11 or 3.12"


def _cuda() -> Look:
    if not _has_cuda():
        return None, None
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, NCCL {nccl}", None


def _engine(package: str, pinned: str) -> Look:
    version = installed.version(package)
    wrong = version is None or (version != pinned and not _has_cuda())
    return version, f"want {pinned}: pip install --no-deps {package}=={pinned}" if wrong else None


def _transformer_engine() -> Look:
    version = installed.version("transformer-engine")
    if version and not installed.transformer_engine():
        return f"{version}, not whole, it has no transformer-engine-torch: not used", None
    if version is None or not _has_cuda():
        return version, None
    # In another process: what fails there may take it along.
    error = _error_of([sys.executable, "-c", "import transformer_engine.pytorch"], _IMPORT_S)
    return version, error and f"does not import, built for another torch? {error}"


def _apex() -> Look:
    version = installed.version("apex")
    foreign = version is not None and not installed.apex()
    return version, "this is not NVIDIA's apex: pip uninstall apex" if foreign else None


def _cudnn() -> Look:
    version = torch.backends.cudnn.version()
    if version is None:
        return None, "torch is a build without it"
    if version not in _BAD_CUDNN and version >= _OLDEST_CUDNN:
        return cudnn_name(version), None
    return cudnn_name(version), (
        "Transformer Engine takes no fused attention from it; pip install -U nvidia-cudnn-cu13, or another "
        "module"
    )


def _nvcc() -> Look:
    """As SGLang looks for it: in CUDA_HOME or CUDA_PATH, on PATH, in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    program = f"{home}/bin/nvcc" if home else (shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    release = re.search(r"release (\d+)\.\d+", _output([program, "--version"]) or "")
    if release is None:
        return None, (
            f"SGLang compiles kernels with nvcc on the compute node, and {program} does not run: load a CUDA "
            "module, or set CUDA_HOME"
        )
    same = not torch.version.cuda or release[1] == torch.version.cuda.partition(".")[0]
    return release[0], (
        None
        if same
        else f"torch is built for CUDA {torch.version.cuda}: set CUDA_HOME to such a one"
    )


def _compiler() -> Look:
    """Whether $CXX, by default c++, really compiles C++20, without which torch 2.14's headers refuse."""
    program = os.environ.get("CXX", "c++")
    version = _output([program, "--version"])
    if version is None:
        return None, f"{program} does not run: load a module with gcc 11 or newer, or set CXX"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "concepts.cpp"
        source.write_text(_CPP20)
        command = [program, "-std=c++20", str(source), "-o", f"{folder}/concepts"]
        error = _error_of(command, _COMPILE_S)
    return version, error and f"{program} compiles no C++20 (gcc 11 or newer, or set CXX): {error}"


def _ninja() -> Look:
    """SGLang and flashinfer call it by its name; servers have this Python's folder on their PATH."""
    program = shutil.which("ninja", path=search_path())
    version = _output([program, "--version"]) if program else None
    return version, None if version else "pip install ninja: SGLang compiles kernels with it"


def _kernel_caches() -> Look:
    """Whether compiled kernels can be kept."""
    for place in sorted({Path(place) for place in cache.kernel_caches().values()}):
        there = next(p for p in (place, *place.parents) if os.path.isdir(p))  # readable or not
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            complaint = f"cannot be written to ({place}: {error.strerror})"
            return str(cache.kernels()), f"{complaint}: set FP16RL_CACHE to a folder that can"
    return str(cache.kernels()), None


_CHECKS = (
    Check("python", _python, "supported"),
    Check(
        "torch", lambda: (torch.__version__, None), f"CUDA {torch.version.cuda or 'not built in'}"
    ),
    Check(
        "cuda", _cuda, "used", "the CPU is used: gloo, fp16 products through fp32; for small models"
    ),
    Check("megatron-core", lambda: _engine("megatron-core", MEGATRON_VERSION), "used"),
    Check("sglang", lambda: _engine("sglang", SGLANG_VERSION), "used"),
    Check(
        "transformer-engine",
        _transformer_engine,
        "layers and FusedAdam",
        "Megatron's local layers; Adam of apex or torch",
    ),
    Check("apex", _apex, "FusedAdam, if Transformer Engine is missing", "optional"),
    Check("cudnn", _cudnn, "fused attention", of_a_gpu=True),
    Check("nvcc", _nvcc, "compiles kernels on their first use", of_a_gpu=True),
    Check("c++20", _compiler, "compiles kernels and Transformer Engine", of_a_gpu=True),
    Check("ninja", _ninja, "compiles kernels", of_a_gpu=True),
    Check(
        "kernel caches",
        _kernel_caches,
        "keep compiled kernels: on a folder that stays, for all nodes, compile once with "
        "fp16rl doctor --warm RECIPE",
        of_a_gpu=True,
    ),
    Check(
        "mpi4py", lambda: (installed.version("mpi4py"), None), "found", "the MPI launcher needs it"
    ),
    Check(
        "slurm",
        lambda: (_output(["sbatch", "--version"]), None),
        "jobs can be submitted",
        "jobs cannot be submitted here",
    ),
)


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _output(command: list[str]) -> str | None:
    """The first line that names a version, or None if there is no such program."""
    try:
        done = answer(command, _VERSION_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), command[0])


def _error_of(command: list[str], timeout_s: float) -> str | None:
    """None if a command succeeds, otherwise the last line of its output."""
    try:
        done = answer(command, timeout_s)
    except subprocess.TimeoutExpired:
        return f"took more than {timeout_s:g} s"
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
