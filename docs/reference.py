"""Writes recipe-keys.md, the list of all keys of a recipe, from megatron_fp16rl/recipe/.

python docs/reference.py
"""

import inspect
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from megatron_fp16rl.recipe import Recipe, Section
from megatron_fp16rl.recipe.values import kind_of, sections_in
from megatron_fp16rl.utils.files import write_text

PAGE = Path(__file__).parent / "recipe-keys.md"
_HEAD = """\
# Keys of a recipe

<!-- Written by docs/reference.py from megatron_fp16rl/recipe/: change that, and run it again. -->

Every key: its default (* if it is required), its type where the default does not show it, what it does.
[Recipes](recipes.md) says how files, `base:` and `--set` make a recipe.
"""
_PLAIN = {str: "text", int: "integer", float: "number", bool: "flag", Any: "any"}


def page() -> str:
    """The whole page: sections in the order in which keys lead to them."""
    titles: dict[type[Section], str] = {Recipe: "The recipe"}
    parts, pending = [_HEAD], [Recipe]
    shown: dict[str, str] = {}
    while pending:
        section = pending.pop(0)
        inner = _titles_of_keys(section, titles)
        titles.update(inner)
        pending = [*inner, *pending]
        parts.append(_section(section, titles, shown))
    return "\n".join(parts)


def _titles_of_keys(section: type[Section], known: dict[type[Section], str]) -> dict:
    """New sections that keys of a section hold, and their titles: `learner.optimizer`."""
    prefix = "" if section is Recipe else known[section].partition(":")[0].strip("`") + "."
    titles: dict[type[Section], str] = {}
    for name, field in section.model_fields.items():
        several = sections_in(field.annotation)
        for each in several:
            kind = f": `kind: {kind_of(each)}`" if len(several) > 1 else ""
            if each not in known:
                titles.setdefault(each, f"`{prefix}{name}`{kind}")
    return titles


def _section(section: type[Section], titles: dict[type[Section], str], shown: dict) -> str:
    """Heading, docstring and keys of a section. An inherited key whose line is under an earlier heading is only named.

    shown: lines so far, and their headings.
    """
    text = inspect.cleandoc(section.__doc__ or "") if section.__doc__ != Section.__doc__ else ""
    comments, keys = _comments(section), []
    above: dict[str, list[str]] = {}
    for name, field in section.model_fields.items():
        line = _key(name, field, titles, comments.get(name))
        if name not in section.__annotations__ and line in shown:
            above.setdefault(shown[line], []).append(f"`{name}`")
        elif name != "kind":  # the heading has it
            shown.setdefault(line, titles[section])
            keys.append(line)
    same = [f"- {', '.join(n)}: as in [{_kind(t)}](#{_anchor(t)})" for t, n in above.items()]
    return "\n".join([f"\n## {titles[section]}\n", *([text, ""] if text else []), *same, *keys])


def _kind(title: str) -> str:
    """What a heading `task`: `kind: dataset` ends with."""
    return title.rpartition("kind: ")[2].strip("`")


def _key(name: str, field: FieldInfo, titles: dict[type[Section], str], comment: str | None) -> str:
    """The line of a key: name, default, type, comment. A default of plain type shows that."""
    kind, default = _type(field.annotation, titles), _default(field)
    if kind.startswith("[section]"):
        head, said = f"[`{name}`]{kind.removeprefix('[section]')}{default}", [comment]
    elif default.startswith(" ") and kind in _PLAIN.values():
        head, said = f"`{name}`{default}", [comment]
    else:
        head, said = f"`{name}`{default}", [kind, comment]
    text = "; ".join(part for part in said if part)
    return f"- {head}" + (f": {text}" if text else "")


def _comments(section: type[Section]) -> dict[str, str]:
    """The comment above a key and the one behind it, as its description."""
    comments: dict[str, str] = {}
    for each in reversed(section.__mro__[: section.__mro__.index(Section)]):
        above: list[str] = []
        for line in inspect.getsource(each).splitlines():
            key = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
            if key and (above or key[2]):
                comments[key[1]] = " ".join([*above, *([key[2]] if key[2] else [])])
            above = [*above, line[6:]] if line.startswith("    # ") else []
    return comments


def _type(annotation: Any, titles: dict[type[Section], str]) -> str:
    """In words: "integer", "list of text", a link to a section."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], titles)
    if origin in (Union, UnionType):
        return " or ".join(_type(part, titles) for part in inner if part is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {_type(inner[0], titles)}"
    if origin is dict:
        return "mapping"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    return f"[{kind_of(annotation) or 'section'}](#{_anchor(titles[annotation])})"


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _default(field: FieldInfo) -> str:
    """As YAML has it; nothing for what is absent by default, or has defaults of its own."""
    if field.is_required():
        return "*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        own = type(value).model_fields
        value = {k: v for k, v in value if own[k].is_required() or v != own[k].default}
    if value in (None, "", [], {}):
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    text = text.removesuffix("...\n").strip()
    return f" (`{text}`)"


if __name__ == "__main__":
    write_text(PAGE, page() + "\n")
