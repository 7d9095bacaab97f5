"""mkdocs hook: links from a page to files of the repository, which the site does not hold.

On GitHub `[the loop](../megatron_fp16rl/train.py)` leads to the file. On the site it becomes its text
alone, after a look whether the file is there.
"""

import logging
import re
from pathlib import Path

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, page: object, config: dict, **_: object) -> str:
    """Takes links that lead out of docs/ out of a page; a dead one is a warning, in strict mode an error."""
    folder = Path(config["docs_dir"]) / Path(page.file.src_uri).parent

    def text(link: re.Match) -> str:
        if not (folder / link[2]).exists():
            _log.warning("%s: there is no file %s", page.file.src_uri, link[2])
        return link[1]

    return _LINK.sub(text, markdown)
