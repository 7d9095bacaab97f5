"""Writes recipe-keys.md, the table of all keys of a recipe, from megatron_fp16rl/recipe/.

python docs/reference.py
"""

import inspect
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from megatron_fp16rl.recipe import Recipe, Section
from megatron_fp16rl.utils.files import write_text

PAGE = Path(__file__).parent / "recipe-keys.md"
_HEAD = """\
# Keys of a recipe

<!-- Written by docs/reference.py from megatron_fp16rl/recipe/: change that, and run it again. -->

Every section and every key, with its type and default. What has no default is required. How files, `base:` and
`--set` make a recipe: [recipes.md](recipes.md).
"""
_PLAIN = {str: "text", int: "integer", float: "number", bool: "true, false", object: "any"}


def page() -> str:
    """The whole page."""
    sections: dict[type[Section], str] = {Recipe: "The recipe"}
    parts = [_HEAD]
    # A section is found by the keys of those before it; the dictionary grows while it is read.
    todo = [Recipe]
    while todo:
        section = todo.pop(0)
        inner = _inner(section, sections)
        sections.update(inner)
        todo = [*inner, *todo]
        parts.append(_table(section, sections))
    return "\n".join(parts)


def _inner(section: type[Section], known: dict[type[Section], str]) -> dict[type[Section], str]:
    """Sections that keys of a section hold, with their places: `learner.optimizer`."""
    prefix = "" if section is Recipe else known[section].partition(":")[0].strip("`") + "."
    found = {}
    for name, field in section.model_fields.items():
        several = [t for t in _types(field.annotation) if _is_section(t)]
        for kind in several:
            if kind not in known and kind not in found:
                tag = kind.model_fields.get("kind") if len(several) > 1 else None
                which = f": `kind: {get_args(tag.annotation)[0]}`" if tag else ""
                found[kind] = f"`{prefix}{name}`{which}"
    return found


def _table(section: type[Section], places: dict[type[Section], str]) -> str:
    """Heading, docstring and keys of a section."""
    title = places[section]
    text = inspect.cleandoc(section.__doc__ or "") if section.__doc__ != Section.__doc__ else ""
    rows = [
        f"| `{name}` | {_type(field.annotation, places)} | {_default(field)} | {_cell(field)} |"
        for name, field in section.model_fields.items()
    ]
    head = ["| key | type | default | what it is |", "|---|---|---|---|"]
    return "\n".join([f"\n## {title}\n", *([text, ""] if text else []), *head, *rows])


def _types(annotation: object) -> list[object]:
    """The types inside unions, lists and annotations."""
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        inner = get_args(annotation)
        inner = inner[:1] if get_origin(annotation) is Annotated else inner
        return [t for part in inner for t in _types(part)]
    return [annotation]


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _type(annotation: object, places: dict[type[Section], str]) -> str:
    """In words: "integer", "list of text", a link to a section."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], places)
    if origin in (Union, UnionType):
        return " or ".join(_type(part, places) for part in inner if part is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {_type(inner[0], places)}"
    if origin is dict:
        return "mapping"
    if _is_section(annotation):
        kind = re.search(r"kind: (\w+)", places[annotation])
        return f"[{kind[1] if kind else 'section'}](#{_anchor(places[annotation])})"
    return _PLAIN[annotation]


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _cell(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    """As YAML has it; nothing for what is absent by default, or has defaults of its own."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        own = type(value).model_fields
        value = {k: v for k, v in value if own[k].is_required() or v != own[k].default}
    if value in (None, "", [], {}):
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    text = text.removesuffix("...\n").strip()
    return f"`{text}`"


if __name__ == "__main__":
    write_text(PAGE, page())
