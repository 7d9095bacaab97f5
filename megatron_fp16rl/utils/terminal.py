"""Text on a terminal. What others wrote (paths, errors, prompts, descriptions) is only text there."""

import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

# Controls that move the cursor, change colours or end a line early; marks that make text run backwards;
# halves of characters, which no terminal can be sent. Tabs and line breaks stay.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text with its control characters made visible: an escape as the four characters \\x1b."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Console(RichConsole):
    """rich's console for text that is not ours: no markup, no emoji codes, no control characters.

    Styles are given by `style=` or in `rich.text.Text`.
    """

    def __init__(self, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else 200
        super().__init__(
            stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, width=width
        )

    def on_broken_pipe(self) -> None:
        """rich would end with code 1; see cli/__init__.py."""
        raise

    def render_str(self, text: str, **how: Any) -> Text:
        """As rich's, which every string goes through, in tables too, before its width is known."""
        return super().render_str(printable(text), **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich's, which everything goes through at last: what is in a Text too."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment._replace(text=text)


def progress_bars(console: Console) -> Progress:
    """rich's usual bars; the descriptions of tasks are no markup."""
    description = TextColumn("{task.description}", markup=False)
    return Progress(
        description, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
    )
