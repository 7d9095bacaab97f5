"""What this machine has, what it lacks, and what that means for a run."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.platform import installed
from megatron_fp16rl.platform.cpu import MEGATRON_VERSION
from megatron_fp16rl.platform.cpu_sglang import SGLANG_VERSION
from megatron_fp16rl.platform.cuda import cudnn_name
from megatron_fp16rl.utils import cache
from megatron_fp16rl.utils.processes import search_path

_NOT_NEEDED = "not needed without a GPU"
_CPP20 = "#include <concepts>\nint main() { return std::same_as<int, int> ? 0 : 1; }\n"
_IMPORT_S, _COMPILE_S = 300, 60
# In these TE 2.11 finds bugs and leaves fused attention out (common/fused_attn/fused_attn.cpp).
_BAD_CUDNN = (91000, 91001)
_OLDEST_CUDNN = 90700  # with which it knows all GPUs that have CUDA 13
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse", "wekafs", "pvfs2", "panfs")
_PASSING = ("tmpfs", "ramfs", "overlay", "squashfs")


@dataclass(frozen=True)
class Finding:
    """One thing looked for. `needed`: nothing runs here without it, or with this version of it."""

    name: str
    found: str | None
    meaning: str
    needed: bool = False


def examine() -> list[Finding]:
    """Looks at Python, the engines, GPUs, what compiles kernels for them, MPI and Slurm."""
    return [
        *(_python(), _torch(), *_gpu(), *_engines(), *_accelerators()),
        *_building(),
        *_launchers(),
    ]


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
    broken = None
    if installed.transformer_engine():
        broken = _import_error("transformer_engine.pytorch") if _has_cuda() else None
        layers = (
            f"does not import, built for another torch? {broken}"
            if broken
            else "layers and FusedAdam"
        )
    elif te:
        layers = f"not whole, it has no transformer-engine-torch: {layers}"
    return [
        Finding("transformer-engine", te, layers, broken is not None),
        Finding(
            "apex",
            apex,
            "this is not NVIDIA's apex: pip uninstall apex"
            if foreign
            else ("FusedAdam, if Transformer Engine is missing" if apex else "optional"),
            foreign,
        ),
    ]


def _building() -> list[Finding]:
    """What compiles and runs kernels that come as source: SGLang's, flashinfer's, Transformer Engine's."""
    if not importlib.util.find_spec("torch"):
        return []
    return [_cudnn(), _nvcc(), _compiler(), _ninja(), _kernel_caches()]


def _cudnn() -> Finding:
    import torch

    version = torch.backends.cudnn.version()
    if version is None:
        return _of_a_gpu("cudnn", None, "fused attention", "torch is a build without it")
    name = cudnn_name(version)
    complaint = None
    if version in _BAD_CUDNN or version < _OLDEST_CUDNN:
        complaint = (
            "Transformer Engine takes no fused attention from it; pip install -U "
            "nvidia-cudnn-cu13, or another module"
        )
    return _of_a_gpu("cudnn", name, "fused attention", complaint)


def _nvcc() -> Finding:
    """As SGLang looks for it: in CUDA_HOME or CUDA_PATH, on PATH, in /usr/local/cuda."""
    import torch

    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    program = f"{home}/bin/nvcc" if home else (shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    said = _output([program, "--version"])
    found = re.search(r"release (\d+)\.\d+", said or "")
    wanted = (torch.version.cuda or "").partition(".")[0]
    complaint = None
    if found is None:
        complaint = (
            f"SGLang compiles kernels with nvcc on the compute node, and {program} does not run: "
            "load a CUDA module, or set CUDA_HOME"
        )
    elif wanted and found[1] != wanted:
        complaint = f"torch is built for CUDA {torch.version.cuda}: set CUDA_HOME to such a one"
    return _of_a_gpu("nvcc", found and found[0], "compiles kernels on their first use", complaint)


def _compiler() -> Finding:
    """Whether $CXX, by default c++, really compiles C++20, without which torch 2.14's headers refuse."""
    program = os.environ.get("CXX", "c++")
    said = _output([program, "--version"])
    complaint = f"{program} does not run: load a module with gcc 11 or newer, or set CXX"
    if said is not None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "concepts.cpp"
            source.write_text(_CPP20)
            command = [program, "-std=c++20", str(source), "-o", f"{folder}/concepts"]
            complaint = _error_of(command, _COMPILE_S)
        if complaint is not None:
            complaint = f"{program} compiles no C++20 (gcc 11 or newer, or set CXX): {complaint}"
    return _of_a_gpu("c++20", said, "compiles kernels and Transformer Engine", complaint)


def _ninja() -> Finding:
    """SGLang and flashinfer call it by its name; servers have this Python's folder on their PATH."""
    program = shutil.which("ninja", path=search_path())
    said = _output([program, "--version"]) if program else None
    complaint = "pip install ninja: SGLang compiles kernels with it" if said is None else None
    return _of_a_gpu("ninja", said, "compiles kernels", complaint)


def _kernel_caches() -> Finding:
    """Whether compiled kernels can be kept, and on what file system."""
    places = sorted({Path(place) for place in cache.kernel_caches().values()})
    kinds, refused = set(), []
    for place in places:
        there = next(p for p in (place, *place.parents) if os.path.isdir(p))  # readable or not
        kinds.add(file_system(there, Path("/proc/mounts").read_text()))
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            refused.append(f"{place}: {error.strerror}")
    complaint = None
    if refused:
        complaint = f"cannot be written to ({refused[0]}): set FP16RL_CACHE to a folder that can"
    return _of_a_gpu(
        "kernel caches",
        f"{cache.kernels()} on {', '.join(sorted(kinds))}",
        _meaning(kinds),
        complaint,
    )


def _meaning(kinds: set[str]) -> str:
    passing = sorted(kinds.intersection(_PASSING))
    if passing:
        return (
            f"{', '.join(passing)}: gone with the container or the node's next start, and compiled "
            "anew each time; set FP16RL_CACHE to a folder that stays (slurm.environment)"
        )
    if any(kind.partition(".")[0] in _NETWORK for kind in kinds):
        return "for all nodes; compile once, before many servers start: fp16rl doctor --warm RECIPE"
    return "of this node alone: each node compiles for itself"


def file_system(path: Path, mounts: str) -> str:
    """The kind of file system that a path lies on, given the text of /proc/mounts."""
    best, kind = Path("/"), "unknown"
    for line in mounts.splitlines():
        _, place, found, *_ = line.split()
        place = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place))
        if path.resolve().is_relative_to(place) and len(place.parts) >= len(best.parts):
            best, kind = place, found  # of two on one place the later one is seen
    return kind


def _of_a_gpu(name: str, found: str | None, meaning: str, complaint: str | None) -> Finding:
    """Something that only a GPU needs."""
    if not _has_cuda():
        return Finding(name, found, _NOT_NEEDED)
    return Finding(name, found, complaint or meaning, complaint is not None)


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
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (answer.stdout or answer.stderr).splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), command[0])


def _import_error(module: str) -> str | None:
    """Why a module does not import, tried in another process: what fails there may take it along."""
    return _error_of([sys.executable, "-c", f"import {module}"], _IMPORT_S)


def _error_of(command: list[str], timeout_s: float) -> str | None:
    """None if a command succeeds, otherwise the last line that it said."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took more than {timeout_s:g} s"
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
