"""How recipes are written: a strict YAML.

Plain values are those of YAML 1.2 (https://yaml.org/spec/1.2.2, section 10.3). What YAML 1.1, which most
readers use, takes for something else is refused: yes, 012, 1_000. So are anchors, tags and a key twice.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_fp16rl.recipe.values import RecipeError

Value = Any  # None, bool, int, float, str, or a list or dict (of text) of these
_MAX_BYTES = 1 << 15  # PyYAML reads them in a second or two; a resolved recipe has some 5,000
_MAX_LEVELS = 50
_TOO_DEEP = f"more than {_MAX_LEVELS} levels"
_TAG = "tag:yaml.org,2002:"
# Tried in this order. What matches none is text.
_PLAIN = {
    "null": r"(~|null|Null|NULL)?",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"0|-?[1-9][0-9]*",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
    "ambiguous": (
        r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|[-+]?0[xob][0-9a-fA-F_]+"
        r"|[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
# What earlier versions replaced. Bash in slurm.setup has no such names.
_REFERENCE = re.compile(r"\$\{(oc\.env:|\w+(\.\w+)+\})")


# Reading.


def read_file(path: Path) -> dict[str, Value]:
    """The keys of a recipe's file, as they are written. Raises RecipeError."""
    try:
        if path.exists() and not path.is_file():  # a pipe might never end
            raise RecipeError(f"{path} is no file: a recipe is a YAML file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = "" if len(data) > _MAX_BYTES else data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{str(path)[:200]} cannot be read: {error}") from None
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"{path} has more than {_MAX_BYTES} bytes: it is no recipe")
    values = read(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of recipe sections")
    return values


def read(text: str, where: str, keys: Sequence[str] = ()) -> Value:
    """One YAML document, the value of `keys`. where: how errors begin. Raises RecipeError."""
    if len(text) > _MAX_BYTES:
        raise RecipeError(f"{where} has more than {_MAX_BYTES} characters: it is no recipe")
    try:
        loader = _Loader(text)
        loader.keys = [*keys]
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem, error.note) if part)
        if "\\t" in problem:
            problem += "; indent with spaces, not with tabs"
        raise RecipeError(f"{where} is not valid YAML: {place}{problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\UFFFFFFFF"
        raise RecipeError(f"{where} is not valid YAML: {error}") from None


def _error(place: Any, problem: str) -> yaml.MarkedYAMLError:
    """place: a node, or an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with our plain values, and with nothing that makes a file more than it shows."""

    yaml_implicit_resolvers: ClassVar[dict] = {}
    yaml_constructors: ClassVar[dict] = {}
    level = 0
    keys: list[str]  # of the value that is constructed

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """As PyYAML's, which takes seconds for a line of a thousand brackets."""
        if self.flow_level > _MAX_LEVELS:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise _error(event, "a recipe has no anchors, aliases or tags: write the value itself")
        if self.level == _MAX_LEVELS:
            raise _error(event, _TOO_DEEP)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def mapping(self, node: yaml.MappingNode) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _error(key_node, "a key must be text: write a number or flag in quotes")
            if key == "<<" and key_node.style is None:
                raise _error(key_node, "a recipe has no merge key <<: inherit with base:")
            if key in values:
                raise _error(key_node, f"the key {key!r} is there twice; remove one")
            self.keys.append(key)
            values[key] = self.construct_object(value_node, deep=True)
            self.keys.pop()
        return values

    def sequence(self, node: yaml.SequenceNode) -> list[Value]:
        return [self.construct_object(item, deep=True) for item in node.value]

    def text(self, node: yaml.ScalarNode) -> str:
        if "\0" in node.value:
            raise _error(node, "text with a NUL character")
        if re.search("[\ud800-\udfff]", node.value):
            raise _error(node, "text with half a surrogate pair, which is no character")
        if reference := _REFERENCE.search(node.value):
            raise _error(
                node,
                f"a recipe has no references, but {reference[0]!r} looks like one: write the value, or "
                '--set KEY="$NAME"',
            )
        return node.value

    def integer(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 20 or abs(int(node.value)) >= 2**63:
            raise _error(node, f"{node.value[:40]!r} does not fit into 64 bits")
        return int(node.value)

    def fraction(self, node: yaml.ScalarNode) -> float:
        text, number = node.value[:40], float(node.value)
        if not math.isfinite(number):
            raise _error(node, f"{text!r}: a finite number is wanted")
        # Options of other programs go to their command lines: 1.10 would be another text than 1.1.
        section = ".".join(self.keys[:2])
        if section == "slurm.options" or (section == "rollout.sglang" and str(number) != text):
            remedy = (
                f"'{text}' in quotes"
                if section == "slurm.options"
                else f"{number}, or '{text}' in quotes"
            )
            raise _error(node, f"{text} is passed on to another program: write {remedy}")
        return number

    def ambiguous(self, node: yaml.ScalarNode) -> Value:
        raise _error(
            node,
            f"{node.value[:40]} is a flag or a number for some readers of YAML, and text for others: write "
            f"true or false, plain finite digits, or '{node.value[:40]}' in quotes",
        )


_CONSTRUCTORS: dict[str, Callable[[_Loader, Any], Value]] = {
    "map": _Loader.mapping,
    "seq": _Loader.sequence,
    "str": _Loader.text,
    "null": lambda _, node: None,
    "bool": lambda _, node: node.value.lower() == "true",
    "int": _Loader.integer,
    "float": _Loader.fraction,
    "ambiguous": _Loader.ambiguous,
}
for _name, _constructor in _CONSTRUCTORS.items():
    _Loader.add_constructor(_TAG + _name, _constructor)


# Writing.


class _Dumper(yaml.SafeDumper):
    """Quotes text that this module or YAML 1.1 would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks of Unicode as they are, and reads them as spaces.
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
        return self.represent_scalar(f"{_TAG}str", text, style)


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_implicit_resolver(f"{_TAG}merge", re.compile("<<$"), None)
for _name, _pattern in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"({_pattern})$"), None)


def flat(values: dict[str, Value], prefix: str = "") -> dict[str, Value]:
    """Dotted keys and values."""
    keys: dict[str, Value] = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and value
        keys |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return keys


def write(values: dict[str, Value]) -> str:
    """YAML that `read` reads back as the same values."""
    return _dump(values, flow=False)


def setting(key: str, value: Value) -> str:
    """KEY=VALUE for `load`, which reads the value unchanged, whatever its text looks like."""
    return f"{key}={inline(value)}"


def inline(value: Value) -> str:
    """A value as YAML on one line."""
    return _dump(value, flow=True).removesuffix("\n").removesuffix("\n...")


def kind_of_plain(text: str) -> str:
    """What unquoted text is: null, bool, int, float, ambiguous or str."""
    return next((kind for kind, pattern in _PLAIN.items() if re.fullmatch(pattern, text)), "str")


def _dump(value: Value, flow: bool) -> str:
    return yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=flow,
        sort_keys=False,
        allow_unicode=True,
        width=2**31,
    )
