"""Other people's text on the terminal: no markup, no control characters, and nothing falls over it."""

import json
import re

from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch import local
from megatron_fp16rl.cli import common
from megatron_fp16rl.utils.terminal import Console, printable, progress_bars
from tests.conftest import ROOT
from tests.runs import fp16rl

# Markup, also such that closes what was never opened; an emoji's code; escapes that clear the screen, name the
# window and colour what follows; a letter taken back; text that runs backwards; half a character.
HOSTILE = "[/b][red]w[/red]:smile:[/__w/x.cc:537]\x1b[2J\x1b]0;t\x07\b\x9b31m\u202eexe\ud800"
SHOWN = HOSTILE.encode("unicode_escape").decode()
TINY = ROOT / "recipes/tiny/dense-grpo-fp16.yaml"


def test_controls_are_shown_and_all_else_is_left_alone():
    assert printable(HOSTILE) == SHOWN
    assert printable("over\rwritten\x0b") == "over\\rwritten\\x0b"
    plain = "é-ß [b] 日本 \U0001f600 a\tb\nc \\x1b"
    assert printable(plain) == plain


def assert_only_text(output: str, times: int) -> None:
    assert printable(output) == output, repr(output)
    # A table's cells may be broken over lines.
    flat = re.sub(r"[\s│┃]", "", output)
    assert flat.count(SHOWN) >= times, output


def test_the_console_shows_only_text_in_whatever_it_prints(capsys):
    console = Console()
    console._width = 2000
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    console.print(HOSTILE, Text.assemble((HOSTILE, "bold")), table, style="dim")
    with Live(table, console=console, auto_refresh=False, transient=False):
        pass
    with progress_bars(console) as progress:
        progress.add_task(HOSTILE, total=1)  # cropped to its column
    assert_only_text(capsys.readouterr().out, 7)  # rich itself drops some controls of a Text


def test_train_prints_its_description_and_the_ranks_last_words_as_they_are(tmp_path, monkeypatch):
    """gloo's errors begin with a path in square brackets: the launcher says them, and goes on."""

    def run(recipe, folder, say):
        say(HOSTILE)
        raise local.RankDied(HOSTILE)

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(common.console, "_width", 2000)
    text = HOSTILE.replace("\ud800", "")  # which no recipe may hold
    settings = [f"description={json.dumps(text)}", f"trainer.run_root={tmp_path}/[red]"]
    words = [f"--set={setting}" for setting in settings]
    result = fp16rl("train", TINY, *words, code=1)
    assert_only_text(result.output, 2)
    assert SHOWN.replace("\\ud800", "") in result.stdout.splitlines()[0]
    assert f"run directory: {tmp_path}/[red]/tiny-dense-grpo-fp16" in result.stdout
    assert f"error: {SHOWN}" in result.stderr


def test_what_rank_0_says_is_only_text_too(tmp_path, capsysbinary):
    line = HOSTILE.encode("utf-8", "surrogatepass") + b"\n"
    local._show([line, b"step 1 | reward 0.5\n"], tmp_path / "rank_0.log")
    shown = capsysbinary.readouterr().out.decode()
    assert printable(shown) == shown
    assert shown.startswith("[/b][red]w[/red]:smile:[/__w/x.cc:537]\\x1b[2J")
    assert shown.endswith("\nstep 1 | reward 0.5\n")
    assert (tmp_path / "rank_0.log").read_bytes().startswith(line)  # the log has it as it was


def test_commands_print_by_these_means_alone():
    """Results go through the console or json.dumps, messages through say(). No markup: it would be shown."""
    for path in (ROOT / "megatron_fp16rl/cli").glob("*.py"):
        code = path.read_text()
        assert not re.search(r"\[/\w*\]", code), path
        assert "rich.console import Console" not in code, path
        assert not re.search(r"(?<![.\w])print\((?!json\.dumps|printable\()", code), path


def test_arguments_are_no_markup_either():
    """Of what typer itself refuses, of a recipe's name, of a run's, of an option's value."""
    argument = "[/b][red][__w]"
    for command in (
        [argument],
        ["train", argument],
        ["status", argument, "--root", argument],
        ["plan", str(TINY), "--gpu", argument],
    ):
        result = fp16rl(*command, code=2)
        assert argument in re.sub(r"[\s│]", "", result.output), command
