"""How recipes are written: a strict YAML, and references such as ${oc.env:HOME} or ${name} in its text.

Plain values are those of YAML 1.2 (https://yaml.org/spec/1.2.2, section 10.3). Some of them mean another
thing in YAML 1.1, which most readers use: yes, 012, 1_000. Of these a text key takes the text, a number or
flag its usual meaning, and options that are passed on refuse them.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_fp16rl.recipe.values import Ambiguous, RecipeError, SpelledFloat, SpelledInt

Value = Any  # None, bool, int, float, str, or a list or dict (of text) of these
_MAX_BYTES = 1 << 18
_MAX_INTEGER = 2**63
_MAX_LEVELS, _MAX_VALUES = 50, 100_000
_TOO_DEEP = f"more than {_MAX_LEVELS} levels"

_TAG = "tag:yaml.org,2002:"
# Tried in this order. What matches none is text.
_PLAIN = {
    "null": r"(~|null|Null|NULL)?",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "ambiguous": (
        r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"  # flags of YAML 1.1
        r"|[-+]?0[0-9_]+|0o[0-7]+|[-+]?0b[01_]+"  # octal in 1.1, decimal in 1.2; and other bases
        r"|[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"
    ),
    "int": r"[-+]?[0-9]+|0x[0-9a-fA-F]+",
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}


# Reading: PyYAML parses, we decide what the nodes mean.


def read_file(path: Path) -> dict[str, Value]:
    """The keys of a recipe's file, as they are written. Raises RecipeError."""
    data = b""
    try:
        is_file = path.is_file() or not path.exists()
        if is_file:  # a pipe might never end
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise RecipeError(f"{str(path)[:200]} cannot be read: {error}") from None
    if not is_file:
        raise RecipeError(f"{path} is no file: a recipe is a YAML file")
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"{path} has more than {_MAX_BYTES} bytes: it is no recipe")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 (byte {data[error.start]:#x} at {error.start}): save it as UTF-8"
        ) from None
    values = read(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of recipe sections")
    return values


def read(text: str, where: str, keys: Sequence[str] = ()) -> Value:
    """One YAML document. where: how errors begin; keys: those whose value it is. Raises RecipeError."""
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _value(node, (*keys,), itertools.count())
    except RecursionError:
        raise RecipeError(f"{where} is not valid YAML: {_TOO_DEEP}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem, error.note) if part)
        if "\\t" in problem:
            problem += "; indent with spaces, not with tabs"
        raise RecipeError(f"{where} is not valid YAML: {place}{problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """As PyYAML's, which takes seconds for a line of a thousand brackets."""
        if self.flow_level > _MAX_LEVELS:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


def _value(node: yaml.Node, keys: tuple[str, ...], counter: Iterator[int]) -> Value:
    """What a node means as the value of `keys`. Raises MarkedYAMLError."""
    if excess := _excess(keys, counter):
        raise _error(node, excess)
    tag = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and tag == "map":
        return _mapping(node, keys, counter)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_value(item, (*keys, str(i)), counter) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and tag in ("str", *_PLAIN):
        return _scalar(node, tag, keys)
    raise _error(node, f"a recipe has no values of {node.tag}")


def _mapping(
    node: yaml.MappingNode, keys: tuple[str, ...], counter: Iterator[int]
) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error(key, "a key must be text")
        if key.value in values:
            raise _error(key, f"the key {key.value!r} is there twice; remove one")
        if key.value == "<<":
            raise _error(key, "a recipe has no merge key <<: write the keys, or inherit with base:")
        values[_text(key.value, key)] = _value(value, (*keys, key.value), counter)
    return values


def _scalar(node: yaml.ScalarNode, tag: str, keys: tuple[str, ...]) -> Value:
    text = node.value
    # Slurm's and bash's words are text as it is written, but for options that are on or off.
    if keys[:1] == ("slurm",) and tag != "null" and (tag != "bool" or keys[1:2] != ("options",)):
        tag = "str"
    try:
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        if tag == "int":
            number = int(text, 16 if text.startswith("0x") else 10)
            if abs(number) >= _MAX_INTEGER:
                raise _error(node, f"{text[:40]!r} does not fit into 64 bits")
            return number if str(number) == text else SpelledInt(number).spelled(text)
        if tag == "float":
            fraction = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            return fraction if str(fraction) == text else SpelledFloat(fraction).spelled(text)
    except ValueError:  # an explicit tag, or more digits than Python reads
        raise _error(node, f"{text[:40]!r} is no value of {tag}") from None
    return Ambiguous(text) if tag == "ambiguous" else _text(text, node)


def _text(text: str, node: yaml.Node) -> str:
    if fault := _unfit(text):
        raise _error(node, fault)
    return text


def _unfit(text: str) -> str | None:
    """Why no file, path or environment can hold a text; None if they can."""
    if "\0" in text:
        return "text with a NUL character"
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return "text with half a surrogate pair, which is no character"
    return None


def _excess(keys: Sequence[str], counter: Iterator[int]) -> str | None:
    """A short file can stand for endless values: by anchors, by references."""
    if len(keys) > _MAX_LEVELS:
        return _TOO_DEEP
    if next(counter) > _MAX_VALUES:
        return f"more than {_MAX_VALUES} values, counting what anchors and references repeat"
    return None


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


# References.

_REMEDY = r". A reference is ${a.b}, another key, or ${oc.env:NAME}; for ${ itself write \${"
_MARK = re.compile(r"(\\*)\$\{")
_BODY = re.compile(r"([^${}]*)\}")
_ENVIRONMENT = re.compile(r"oc\.env:\s*([A-Za-z_]\w*)\s*(?:,(.*))?$", re.DOTALL)
_KEY = re.compile(r"[^\s.:,]+(\.[^\s.:,]+)*$")
_BASH = ("slurm", "setup")  # lines of bash, which has its own ${...}


class BadReference(ValueError):
    """A reference to nothing. keys: where it is written."""

    def __init__(self, keys: Sequence[str], message: str) -> None:
        super().__init__(message)
        self.keys = [*keys]


def resolve(values: dict[str, Value]) -> dict[str, Value]:
    """Values with their references replaced. Raises BadReference.

    `${a.b}` is the value of another key, `${oc.env:NAME}` and `${oc.env:NAME,default}` the text of an
    environment variable; `\\${` stands for `${` itself. Lines of slurm.setup are left as they are.
    """
    return _References(values).replace(values, ())


def resolve_text(text: str, values: dict[str, Value]) -> Value:
    """The value of one text of `values`. Raises BadReference."""
    return _References(values).replace(text, ("",))


class _References:
    def __init__(self, values: dict[str, Value]) -> None:
        self.values, self.open, self.counter = values, set[str](), itertools.count()

    def replace(self, value: Value, keys: tuple[str, ...]) -> Value:
        """A value of `keys`, references in it replaced."""
        if excess := _excess(keys, self.counter):
            raise BadReference(keys[:5], excess)
        if isinstance(value, dict):
            return {key: self.replace(inner, (*keys, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.replace(inner, (*keys, str(i))) for i, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if keys[:2] != _BASH:
            return self._replace_in(value, keys)
        if "${oc." in value:
            raise BadReference(
                keys, "lines of slurm.setup are bash's: write ${NAME}, without oc.env:"
            )
        return value

    def _replace_in(self, text: str, keys: tuple[str, ...]) -> Value:
        parts: list[Value] = []
        end = 0
        while mark := _MARK.search(text, end):
            slashes = len(mark[1])
            parts.append(text[end : mark.start()] + "\\" * (slashes // 2))
            end = mark.end()
            if slashes % 2:
                parts.append("${")
                continue
            body = _BODY.match(text, end)
            if body is None:
                raise BadReference(keys, f"${{ without an end of its own{_REMEDY}")
            end = body.end()
            parts.append(self._look_up(body[1].strip(), keys))
        parts = [part for part in (*parts, text[end:]) if part != ""]
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, dict | list) for part in parts):
            raise BadReference(keys, "a section or a list cannot stand inside of text")
        return "".join(
            str(part).lower() if isinstance(part, bool) else "null" if part is None else str(part)
            for part in parts
        )

    def _look_up(self, name: str, keys: tuple[str, ...]) -> Value:
        shown = f"${{{name}}}"
        if variable := _ENVIRONMENT.match(name):
            text = os.environ.get(variable[1], variable[2])
            if text is None:
                raise BadReference(keys, f"{shown}: the environment has no {variable[1]}; set it")
            if fault := _unfit(text):
                raise BadReference(keys, f"{shown}: {fault}")
            return text
        if not _KEY.match(name):
            raise BadReference(keys, f"{shown} is no reference{_REMEDY}")
        if name in self.open:
            raise BadReference(keys, f"{shown} leads back to itself")
        value: Value = self.values
        for key in name.split("."):
            if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise BadReference(keys, f"{shown}: the recipe has no key {name!r}{_REMEDY}")
        self.open.add(name)
        value = self.replace(value, tuple(name.split(".")))
        self.open.remove(name)
        return value


# Writing.


class _Dumper(yaml.SafeDumper):
    """Quotes text that this module or YAML 1.1 would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks of Unicode as they are, and reads them as spaces.
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
        return self.represent_scalar(f"{_TAG}str", text, style)

    def as_written(self, value: SpelledInt | SpelledFloat | Ambiguous) -> yaml.ScalarNode:
        tag = self.resolve(yaml.ScalarNode, str(value), (True, False))
        return self.represent_scalar(tag, str(value))


_Dumper.add_representer(str, _Dumper.text)
for _kind in (SpelledInt, SpelledFloat, Ambiguous):
    _Dumper.add_representer(_kind, _Dumper.as_written)
_Dumper.add_implicit_resolver(f"{_TAG}merge", re.compile("<<$"), None)
for _name, _pattern in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"({_pattern})$"), None)


def write(values: dict[str, Value]) -> str:
    """YAML that `read` and `resolve` read back as the same values."""
    return _dump(_escaped(values, ()), flow=False)


def setting(key: str, value: Value) -> str:
    """KEY=VALUE for `load`, which reads the value unchanged, whatever its text looks like."""
    text = _dump(_escaped(value, tuple(key.split("."))), flow=True)
    return f"{key}=" + text.removesuffix("\n").removesuffix("\n...")


def escape(text: str) -> str:
    """Text without references: `resolve` gives back `text`."""
    return _MARK.sub(lambda mark: mark[1] * 2 + "\\${", text)


def _escaped(value: Value, keys: tuple[str, ...]) -> Value:
    if isinstance(value, dict):
        return {key: _escaped(inner, (*keys, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner, keys) for inner in value]
    has_mark = isinstance(value, str) and "${" in value and keys[:2] != _BASH
    return escape(value) if has_mark else value


def _dump(value: Value, flow: bool) -> str:
    return yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=flow,
        sort_keys=False,
        allow_unicode=True,
        width=2**31,
    )
