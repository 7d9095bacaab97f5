"""Container images are built as pages, pins and Makefile say. slurm/container/test.sh builds one."""

import re
from fnmatch import fnmatch

import pytest

from tests.conftest import ROOT

GPU, CPU = "slurm/container/Containerfile", "slurm/container/Containerfile.cpu"
PAGE, PINS = "docs/slurm.md", "requirements.txt"


def instructions(text):
    """(word, rest) of each, its lines joined."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def of(word, file):
    return [rest for first, rest in file if first == word]


def installs(text):
    """Every `pip install ...` that begins a line, less its comment."""
    return re.findall(r"^(?:#\s+|RUN )?(pip install .*?)(?: +#.*)?$", text, re.MULTILINE)


def faults(old="", new="", of_file=""):
    """What does not hold, with a text of one file replaced."""
    names = (GPU, CPU, PAGE, PINS, "Makefile", ".dockerignore", ".gitignore")
    texts = {name: (ROOT / name).read_text() for name in names}
    if of_file:
        assert old in texts[of_file]
        texts[of_file] = texts[of_file].replace(old, new)
    gpu, cpu = instructions(texts[GPU]), instructions(texts[CPU])
    page = installs(texts[PAGE].split("## Install")[1].split("```")[1])
    (base,) = (value for value in of("ARG", gpu) if value.startswith("BASE="))
    cuda = re.search(r"CUDA (\d+)", texts[PINS])[1]
    made_from = " ".join(of("COPY", cpu[: cpu.index(("RUN", "make venv"))])).split()
    stamp = re.search(r"\$\(shell cat (.*?) <", texts["Makefile"])[1].split()
    out = [line.removeprefix("**/") for line in texts[".dockerignore"].split()]
    git = [line.strip("/") for line in texts[".gitignore"].split()]
    checks = {
        "the image has the page's steps": installs(texts[GPU]) == page[:4],
        "so have the pins": installs(texts[PINS]) == installs(texts[GPU]),
        "versions are the pins' alone": not re.search(r"==\d", texts[GPU] + texts[CPU]),
        "the base has CUDA, nvcc and cuDNN": f"/cuda:{cuda}." in base and "-cudnn-devel-" in base,
        # Pyxis and Apptainer let these win over what a job exports.
        "PATH alone is set": [value.partition("=")[0] for value in of("ENV", gpu)] == ["PATH"],
        "make has what it builds from": {"Makefile", *stamp} <= set(made_from),
        "the project is copied last": of("COPY", gpu)[-1] == of("COPY", cpu)[-1] == ". .",
        "what git ignores stays out": all(any(fnmatch(g, o) for o in out) for g in git),
    }
    return [name for name, holds in checks.items() if not holds]


def test_images_are_built_as_pages_and_pins_say():
    assert faults() == []


DRIFTS = {
    "the image has the page's steps": ("--no-build-isolation -r", "-r", PAGE),
    "so have the pins": ("|cmake|", "|", PINS),
    "versions are the pins' alone": (
        "RUN make venv",
        "RUN make venv\nRUN pip install torch==2.13.0",
        CPU,
    ),
    "the base has CUDA, nvcc and cuDNN": ("CUDA 13", "CUDA 14", PINS),
    "PATH alone is set": ("ENV PATH", "ENV PYTHONPATH=/opt\nENV PATH", GPU),
    "make has what it builds from": ("pyproject.toml ", "", CPU),
    "the project is copied last": ("COPY . .", "COPY . .\nCOPY requirements.txt ./", GPU),
    "what git ignores stays out": ("/runs/", "/runs/\n/secrets/", ".gitignore"),
}


@pytest.mark.parametrize("fault", DRIFTS)
def test_a_drift_is_seen(fault):
    assert faults(*DRIFTS[fault]) == [fault]
