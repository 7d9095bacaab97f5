"""Content-addressed cache folders, and where libraries cache compiled kernels."""

import hashlib
import json
import os
from pathlib import Path
from tempfile import gettempdir
from typing import Any

# What libraries compile on their first use of a GPU: the variable that says where each keeps it, and where
# below our folder that is. Read by sglang 0.5.23 (srt/environ.py, kernels/jit/utils/compile/cache.py),
# flashinfer, apache-tvm-ffi, triton, torch and the CUDA driver.
_KERNELS = {
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_JIT_CACHE_DIR": "sglang/jit",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TVM_FFI_CACHE_DIR": "tvm-ffi",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
}


def root() -> Path:
    """$FP16RL_CACHE, by default ~/.cache/fp16rl."""
    return Path(os.environ.get("FP16RL_CACHE", Path.home() / ".cache" / "fp16rl"))


def kernels() -> Path:
    """The cache of compiled kernels, unless a library's own variable says otherwise."""
    return root() / "kernels"


def kernel_caches() -> dict[str, str]:
    """Variables for a process that computes: all that it compiles outlives it, and is compiled once.

    By default half of it would be in the user's home and half in TMPDIR, which a server has for itself
    and a container takes away. What is set already is kept.
    """
    environment = dict(os.environ)
    # torch 2.13 sets this one itself, to its default, as soon as parts of it are imported.
    if environment.get("TORCHINDUCTOR_CACHE_DIR", "").startswith(f"{gettempdir()}/torchinductor_"):
        del environment["TORCHINDUCTOR_CACHE_DIR"]
    return {name: environment.get(name, str(kernels() / place)) for name, place in _KERNELS.items()}


def cache_folder(kind: str, *ingredients: Any) -> Path:
    """The folder for what is made from `ingredients` (JSON values); it may not exist yet."""
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    return root() / kind / digest[:16]


def sources(*packages: str) -> str:
    """A digest of the source of some sub-packages, for what depends on their code."""
    root_package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted((root_package / package).glob("**/*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
