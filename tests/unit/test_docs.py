"""What the documentation says is so: links lead somewhere, names and messages are those of the code."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer

from megatron_fp16rl.cli import app
from megatron_fp16rl.models.families import FAMILIES
from tests import families
from tests.conftest import ROOT, python
from tests.ranks.test_range import published

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CODE = [
    f for folder in ("megatron_fp16rl", "launch") for f in sorted((ROOT / folder).rglob("*.py"))
]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = ["".join(c for c in t.lower() if c.isalnum() or c in " -_") for t in titles]
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_site_is_whole_and_fetches_nothing(tmp_path):
    site = tmp_path / "site"
    python("-m", "mkdocs", "build", "--strict", "--site-dir", site)
    pages = list(site.glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in DOCS.glob("*.md")}
    fetched = r"<(?:script|img|iframe|link)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]*"
    outside = [link for page in pages for link in re.findall(fetched, page.read_text())]
    styles = "".join(style.read_text() for style in site.rglob("*.css"))
    assert outside + re.findall(r"(?:@import|url\()[\s\"']*(?:https?:)?//", styles) == []


def test_a_dead_link_out_of_docs_breaks_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# A\n\n[gone](../no/such.py)\n")
    (tmp_path / "mkdocs.yml").write_text(f"site_name: a\nhooks: [{DOCS / 'hooks.py'}]\n")
    done = python("-m", "mkdocs", "build", "--strict", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "there is no file ../no/such.py" in done.stdout + done.stderr


def test_what_others_published_on_fp16_is_what_families_files_say():
    assert (DOCS / "range.md").read_text().endswith(f"\n\n{published()}")


def test_the_keys_of_a_recipe_are_all_there():
    printed = python("-c", "import reference; print(reference.page())", cwd=DOCS).stdout
    assert (DOCS / "recipe-keys.md").read_text() == printed, "run: python docs/reference.py"


def test_the_table_of_models_is_that_of_the_code():
    page = (DOCS / "models.md").read_text()
    assert page == families.page(), "run: python -m tests.families > docs/models.md"
    readme = (DOCS.parent / "README.md").read_text()
    for family in FAMILIES:
        name = family.replace("_", "-").replace("glm4-moe-lite", "glm-4.7-flash")
        assert name.replace("glm4-moe", "glm-4.5") in readme.lower(), family


@cache
def strings() -> str:
    """All strings of the code; in f-strings … stands for what varies."""
    texts = []
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                texts.append("".join(parts))
    return "\n".join(texts)


def test_messages_are_quoted_as_the_code_says_them():
    page = (DOCS / "troubleshooting.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    quoted = [
        part.strip(" .;,:()") for line in "".join(blocks).splitlines() for part in line.split("…")
    ]
    assert len(quoted) > 50
    assert [part for part in quoted if part not in strings()] == []


def test_metrics_are_those_that_runs_have():
    groups = (
        "reward|eval|response|rollout|mismatch|staleness|loss|correction|grad|fp16|time|sync|tokens"
    )
    names = {re.escape(name) for name in re.findall(rf"\b(?:{groups})/[\w…]+", strings())}
    for page in PAGES:
        for name in re.findall(rf"`((?:{groups})/\w+)`", page.read_text()):
            like = [n for n in names if re.fullmatch(n.replace("…", r"(\w+)"), name)]
            # Of mismatch/… all that varies is a string of its own.
            varies = [re.fullmatch(n.replace("…", r"(\w+)"), name).groups() for n in like]
            known = any(all(v in strings() for v in each) for each in varies)
            assert known, f"{page.name}: {name}"


def commands() -> list[list[str]]:
    """Every `fp16rl ...` in a block of code or a span of it, as words. The log tells of past ones."""
    pages = [page for page in PAGES if page.stem not in ("LOG", "log-archive")]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    blocks = re.findall(r"^ *```(?:bash|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"`(fp16rl [^`]+)`", text)]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fp16rl ")]


def test_commands_and_their_options_exist():
    root = typer.main.get_command(app)
    assert len(commands()) > 50
    for words in commands():
        command, rest = root, list(words)
        while hasattr(command, "commands") and rest:
            name = rest.pop(0)
            for each in name.split("|"):
                assert each in command.commands, " ".join(words)
            command = command.commands[name.split("|")[0]]
        known = {o for p in command.params for o in p.opts + p.secondary_opts} | {"--help"}
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert options <= known, " ".join(words)


def test_recipes_that_are_named_exist():
    """In pages, in help and in messages. recipes/mine.yaml is the reader's own."""
    text = strings() + "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?<![\w/])recipes/[\w.*/-]+\.yaml", text)) - {"recipes/mine.yaml"}
    named |= {
        f"recipes/*/{name}.yaml" for name in re.findall(r"--from ([a-z][\w.-]+)(?!\S*/)", text)
    }
    assert len(named) > 8
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


def test_build_tools_come_before_what_is_built_with_them():
    """`--no-build-isolation` takes what is there: a new environment has neither wheel nor ninja."""
    lines = (DOCS / "slurm.md").read_text().splitlines()
    (tools,) = [number for number, line in enumerate(lines) if "grep -E '^(setuptools" in line]
    first = next(n for n, line in enumerate(lines) if "--no-build-isolation" in line)
    assert tools < first
    names = re.search(r"\^\((.*)\)=", lines[tools])[1].split("|")
    pinned = (DOCS.parent / "requirements.txt").read_text()
    assert {"setuptools", "wheel", "ninja"} <= set(names)
    for name in names:
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name
