"""Container images are built as pages, pins and Makefile say. slurm/container/test.sh builds one."""

import re
from fnmatch import fnmatch

from tests.conftest import ROOT

GPU, CPU = (
    (ROOT / "slurm/container" / name).read_text() for name in ("Containerfile", "Containerfile.cpu")
)
PINS = (ROOT / "requirements.txt").read_text()


def instructions(text):
    """(word, rest) of each, its lines joined."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def of(word, file):
    return [rest for first, rest in instructions(file) if first == word]


def installs(text):
    """Every `pip install ...` that begins a line, less its comment."""
    return re.findall(r"^(?:#\s+|RUN )?(pip install .*?)(?: +#.*)?$", text, re.MULTILINE)


def test_images_have_the_steps_of_the_page_and_of_the_pins():
    page = (ROOT / "docs/slurm.md").read_text().split("## Install")[1].split("```")[1]
    assert installs(GPU) == installs(page)[:4] == installs(PINS)
    assert not re.search(r"==\d", GPU + CPU), "versions are the pins' alone"
    (base,) = (value for value in of("ARG", GPU) if value.startswith("BASE="))
    cuda = re.search(r"CUDA (\d+)", PINS)[1]
    assert f"/cuda:{cuda}." in base
    assert "-cudnn-devel-" in base  # with nvcc


def test_images_hold_the_project_and_nothing_else():
    # Pyxis and Apptainer let these win over what a job exports.
    assert [value.partition("=")[0] for value in of("ENV", GPU)] == ["PATH"]
    before_make = CPU[: CPU.index("RUN make venv")]
    stamp = re.search(r"\$\(shell cat (.*?) <", (ROOT / "Makefile").read_text())[1].split()
    assert {"Makefile", *stamp} <= set(" ".join(of("COPY", before_make)).split())
    assert of("COPY", GPU)[-1] == of("COPY", CPU)[-1] == ". ."
    out = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()]
    git = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    assert [name for name in git if not any(fnmatch(name, o) for o in out)] == []
