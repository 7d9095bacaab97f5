"""How recipes are written: a strict YAML, and references such as ${oc.env:HOME} or ${name} in its text.

Plain values are those of YAML 1.2 (https://yaml.org/spec/1.2.2, section 10.3). Where YAML 1.1, which most
readers know, takes them for something else (yes, 012, 1_000), a key that wants text has them as they are
written, one that wants a number or a flag reads them as anybody would, and options that are passed on to
others refuse them. No key may be there twice.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_fp16rl.recipe.section import Ambiguous, RecipeError, SpelledFloat, SpelledInt

Value = Any  # None, bool, int, float, str, or a list or dict (of text) of these
_LARGEST_FILE = 1 << 18
_LARGEST_INTEGER = 2**63
_DEEPEST, _MOST = (
    50,
    100_000,
)  # levels and values of a file, whatever its anchors and references make of it
_TOO_DEEP = f"more than {_DEEPEST} levels"
_RAW = ("slurm", "setup")  # lines of bash, which has its own ${...}

_TAG = "tag:yaml.org,2002:"
# In this order. What matches none is text.
_PLAIN = {
    "null": re.compile(r"(~|null|Null|NULL)?$"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)$"),
    "word": re.compile(
        r"""(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF   # flags of YAML 1.1
        |[-+]?0[0-9_]+                                     # octal there, decimal in 1.2
        |[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?
        |0o[0-7]+|[-+]?0b[01_]+)$""",
        re.VERBOSE,
    ),
    "int": re.compile(r"([-+]?[0-9]+|0x[0-9a-fA-F]+)$"),
    "float": re.compile(
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    "merge": re.compile(r"<<$"),
}


def read_file(path: Path) -> dict[str, Value]:
    """The keys of a recipe's file, as they are written. Raises RecipeError."""
    try:
        is_file = path.is_file() or not path.exists()
        data = b""
        if is_file:  # a pipe might never end
            with path.open("rb") as file:
                data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise RecipeError(f"{str(path)[:200]} cannot be read: {error}") from None
    if not is_file:
        raise RecipeError(f"{path} is no file: a recipe is a YAML file")
    if len(data) > _LARGEST_FILE:
        raise RecipeError(f"{path} has more than {_LARGEST_FILE} bytes: it is no recipe")
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


def read(text: str, where: str, at: Sequence[str] = ()) -> Value:
    """One YAML document. where: what an error begins with; at: the keys whose value it is.

    Raises RecipeError.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Reader().value(node, (*at,))
    except RecursionError:
        raise RecipeError(f"{where} is not valid YAML: {_TOO_DEEP}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem, error.note) if part)
        if "\\t" in what:
            what += "; indent with spaces, not with tabs"
        raise RecipeError(f"{where} is not valid YAML: {place}{what}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """As PyYAML's, which takes seconds for a line of a thousand brackets."""
        if self.flow_level > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)


class _Dumper(yaml.SafeDumper):
    """Quotes what this module or YAML 1.1 would take for something else than text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line breaks of Unicode as they are, and reads them as spaces.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style)


def _represent_as_written(
    dumper: _Dumper, value: SpelledInt | SpelledFloat | Ambiguous
) -> yaml.ScalarNode:
    tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))
    return dumper.represent_scalar(tag, str(value))


_Dumper.add_representer(str, _represent_text)
for _kind in (SpelledInt, SpelledFloat, Ambiguous):
    _Dumper.add_representer(_kind, _represent_as_written)
for _name, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, None)


class _Reader:
    """Values of YAML's nodes."""

    def __init__(self) -> None:
        self.values = 0

    def value(self, node: yaml.Node, at: tuple[str, ...]) -> Value:
        """What a node is as the value of a key. Raises MarkedYAMLError."""
        self.values += 1
        if len(at) > _DEEPEST:
            raise _error(node, _TOO_DEEP)
        if self.values > _MOST:
            raise _error(node, f"more than {_MOST} values, counting what anchors repeat")
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item, (*at, str(i))) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
            return self._scalar(node, tag, at)
        raise _error(node, f"a recipe has no values of {node.tag}")

    def _mapping(self, node: yaml.MappingNode, at: tuple[str, ...]) -> dict[str, Value]:
        own: dict[str, Value] = {}
        merged: dict[str, Value] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error(key, "a key must be text")
            if key.value in own or (key.tag == f"{_TAG}merge" and merged):
                raise _error(key, f"the key {key.value!r} is there twice; remove one")
            if key.tag != f"{_TAG}merge":
                own[self._text(key.value, key)] = self.value(value, (*at, key.value))
                continue
            inner = self.value(value, at)
            for source in inner if isinstance(inner, list) else [inner]:
                if not isinstance(source, dict):
                    raise _error(value, "<< takes a mapping, or a list of mappings")
                merged = {**source, **merged}
        return {**merged, **own}

    def _scalar(self, node: yaml.ScalarNode, tag: str, at: tuple[str, ...]) -> Value:
        # Slurm's and the shell's words are text as it is written, but for options that are on or off.
        if (
            at[:1] == ("slurm",)
            and tag != "null"
            and not (tag == "bool" and at[1:2] == ("options",))
        ):
            tag = "str"
        try:
            value = _SCALARS[tag](node.value)
        except ValueError:  # an explicit tag, or more digits than Python reads
            raise _error(node, f"{node.value[:40]!r} is no value of {tag}") from None
        if isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
            raise _error(node, f"{node.value[:40]!r} does not fit into 64 bits")
        return self._text(value, node) if isinstance(value, str) else value

    def _text(self, text: str, node: yaml.Node) -> str:
        if fault := _unfit(text):
            raise _error(node, fault)
        return text


def _spelled(kind: type[SpelledInt] | type[SpelledFloat], value: float, text: str) -> float:
    return value if str(value) == text else kind(value, text)


def _integer(text: str) -> int:
    return _spelled(SpelledInt, int(text, 16 if text.startswith("0x") else 10), text)


def _float(text: str) -> float:
    number = text.lower().replace(".inf", "inf").replace(".nan", "nan")
    return _spelled(SpelledFloat, float(number), text)


_SCALARS: dict[str, Callable[[str], Value]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": _float,
    "str": str,
    "word": Ambiguous,
    "merge": str,  # << as a value
}


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _unfit(text: str) -> str | None:
    """What is wrong with text that neither a file nor a path nor an environment can hold."""
    if "\0" in text:
        return "text with a NUL character"
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return "text with half a surrogate pair, which is no character"
    return None


class BadReference(ValueError):
    """What stands for nothing. keys: where it is written."""

    def __init__(self, keys: Sequence[str], message: str) -> None:
        super().__init__(message)
        self.keys = [*keys]


def resolve(values: dict[str, Value]) -> dict[str, Value]:
    """Values with what their references stand for. Raises BadReference.

    `${a.b}` is the value of another key, `${oc.env:NAME}` and `${oc.env:NAME,default}` the text of an
    environment variable, `\\${` no reference but those two characters. Lines of slurm.setup are left as they
    are.
    """
    return _References(values).value(values, ())


def resolve_text(text: str, values: dict[str, Value]) -> Value:
    """What one text of `values` comes to. Raises BadReference."""
    return _References(values).value(text, ("",))


def escape(text: str) -> str:
    """Text in which nothing is a reference: `resolve` gives it back."""
    return _MARK.sub(lambda mark: mark[1] * 2 + "\\${", text)


_MARK = re.compile(r"(\\*)\$\{")
_BODY = re.compile(r"([^${}]*)\}")
_ENVIRONMENT = re.compile(r"oc\.env:\s*([A-Za-z_]\w*)\s*(?:,(.*))?$", re.DOTALL)
_KEY = re.compile(r"[^\s.:,]+(\.[^\s.:,]+)*$")


class _References:
    """What references of a recipe stand for."""

    def __init__(self, values: dict[str, Value]) -> None:
        self.all, self.under_way, self.values = values, set[str](), 0

    def value(self, value: Value, keys: tuple[str, ...]) -> Value:
        self.values += 1
        if len(keys) > _DEEPEST:
            raise BadReference(keys[:5], _TOO_DEEP)
        if self.values > _MOST:
            raise BadReference(
                keys[:5], f"more than {_MOST} values, counting what references repeat"
            )
        if isinstance(value, dict):
            return {key: self.value(inner, (*keys, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner, (*keys, str(i))) for i, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if keys[:2] == _RAW:
            if "${oc." in value:
                raise BadReference(
                    keys, "lines of slurm.setup are bash's: write ${NAME}, without oc.env:"
                )
            return value
        return self._text(value, keys)

    def _text(self, text: str, keys: tuple[str, ...]) -> Value:
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
        parts.append(text[end:])
        parts = [part for part in parts if part != ""]
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, dict | list) for part in parts):
            raise BadReference(keys, "a section or a list cannot stand inside of text")
        return "".join(map(_in_text, parts))

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
        if name in self.under_way:
            raise BadReference(keys, f"{shown} leads back to itself")
        self.under_way.add(name)
        path = tuple(name.split("."))
        value = self.value(self._at(path, shown, keys), path)
        self.under_way.remove(name)
        return value

    def _at(self, path: tuple[str, ...], shown: str, keys: tuple[str, ...]) -> Value:
        value: Value = self.all
        for key in path:
            if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise BadReference(
                    keys, f"{shown}: the recipe has no key {'.'.join(path)!r}{_REMEDY}"
                )
        return value


_REMEDY = r". A reference is ${a.b}, another key, or ${oc.env:NAME}; for ${ itself write \${"


def _in_text(value: Value) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def write(values: dict[str, Value]) -> str:
    """YAML that `read` and `resolve` read back as the same values."""
    return yaml.dump(
        _escaped(values, ()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31
    )


def setting(key: str, value: Value) -> str:
    """KEY=VALUE for `load`, in which the value is read as what it is, whatever it looks like."""
    text = yaml.dump(
        _escaped(value, tuple(key.split("."))),
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        width=2**31,
    )
    return f"{key}=" + text.removesuffix("\n").removesuffix("\n...")


def _escaped(value: Value, keys: tuple[str, ...]) -> Value:
    if isinstance(value, dict):
        return {key: _escaped(inner, (*keys, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner, keys) for inner in value]
    is_text = isinstance(value, str) and "${" in value and keys[:2] != _RAW
    return escape(value) if is_text else value
