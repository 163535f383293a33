"""Values of a configuration file by their dotted paths, with the places where they stand: JSON, TOML, YAML, Python.

The YAML that programs of this field use is read: keys, lists, brackets and texts; anchors and tags are left out.
"""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

Value = bool | int | float | str | None


class Place(NamedTuple):
    """The line of a key, and its value between two columns; `end` is 0 where the value is not on this line."""

    line: int
    indent: int
    start: int
    end: int


_YAML_KEY = re.compile(
    r"(?P<key>\"[^\"\n]*\"|'[^'\n]*'|[^\s#&*!|>'\"%@`{\[\]},:?-][^#:\n]*?|-[\w-]+)\s*:(?=\s|$)[ \t]*"
)
_TOML_KEY = re.compile(r"[ \t]*(?P<key>[\w.\"'-]+)[ \t]*=[ \t]*")
_SECTION = re.compile(r"[ \t]*\[{1,2}[ \t]*([\w.\"' -]+?)[ \t]*\]{1,2}")
_TAG = re.compile(r"(?:[&!]\S*[ \t]+)+")
_BLOCK = re.compile(r"[|>][+-]?\d?[+-]?$")
_COMMENT = re.compile(r"(?:^|(?<=\s))#[^\n]*")
_WORDS: Mapping[str, Value] = {
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
    "null": None,
    "~": None,
    "": None,
}
_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*)?\.?\d+(?:[eE][+-]?\d+)?")


def kind_of(path: str, text: str) -> str:
    """Return the language of a file, by its name or by its beginning: json, toml, yaml or python."""
    suffix = Path(path).suffix.lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        return "json"
    first = next((line for line in text.splitlines() if _COMMENT.sub("", line).strip()), "")
    return "yaml" if _YAML_KEY.match(first.strip()) else "toml" if _SECTION.fullmatch(first) else "python"


_KINDS = {".json": "json", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".py": "python"}


def values_in(path: str, text: str) -> dict[str, Value]:
    """Return the values of a file by their paths; nothing for one that cannot be read.

    >>> values_in("a.yaml", "train:\\n  batch: 4  # each\\n  on: [x, y]\\n")
    {'train.batch': 4, 'train.on[]': 'x, y'}
    """
    return _READERS[kind_of(path, text)](text.removeprefix("\ufeff"))


def without_comments(path: str, text: str) -> str:
    """Return a file's text without its comments, which may be about other runs."""
    kind = kind_of(path, text)
    return text if kind == "json" else "\n".join(bare_line(line) for line in text.splitlines())


def bare_line(line: str) -> str:
    """Return a line without its comment; a sign in quotation marks begins none.

    >>> bare_line("a: 'b # c'  # d"), bare_line("a: don't # e"), bare_line("a: b#c")
    ("a: 'b # c'", "a: don't", 'a: b#c')
    """
    quote, before = "", " "
    for place, each in enumerate(line):
        if quote:
            is_escaped = quote == '"' and (place - len(line[:place].rstrip("\\"))) % 2 == 1
            quote = "" if each == quote and not is_escaped else quote
        elif each in "'\"" and before in _BEFORE_QUOTES:
            quote = each
        elif each == "#" and before in " \t":
            return line[:place].rstrip()
        before = each
    return line.rstrip()


_BEFORE_QUOTES = " \t:,[{(=-'"
"""Characters behind which a quotation mark opens a text; elsewhere it is an apostrophe."""


def flat(value: object, path: str = "") -> Iterator[tuple[str, Value]]:
    """Yield the plain values in a mapping with their paths; `[]` stands for the items of a list."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from flat(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        plain = [str(each) for each in value if not isinstance(each, dict | list)]
        if plain:
            yield f"{path}[]", ", ".join(plain)
        for each in value:
            if isinstance(each, dict):
                yield from flat(each, f"{path}[]")
    elif value is None or isinstance(value, bool | int | float | str):
        yield path, value
    else:  # a date of TOML
        yield path, str(value)


def _json(text: str) -> dict[str, Value]:
    try:
        return dict(flat(json.loads(text)))
    except (ValueError, RecursionError):
        return {}


def _toml(text: str) -> dict[str, Value]:
    try:
        return dict(flat(tomllib.loads(text)))
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _python(text: str) -> dict[str, Value]:
    """Return the plain values of a Python configuration, with those in dict(...) below the name of their part."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return {}
    found: dict[str, Value] = {}
    for each in statements:
        if isinstance(each, ast.Assign) and len(each.targets) == 1 and isinstance(each.targets[0], ast.Name):
            found |= dict(_of_node(each.value, each.targets[0].id))
    return found


def _of_node(node: ast.expr, path: str) -> Iterator[tuple[str, Value]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        for keyword in node.keywords:
            if keyword.arg:
                yield from _of_node(keyword.value, f"{path}.{keyword.arg}")
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield from _of_node(value, f"{path}.{key.value}")
    elif isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool | int | float | str)):
        yield path, node.value


def _scalar(text: str) -> Value:
    """Read a plain value as YAML writes it.

    >>> [_scalar(each) for each in ("4", "2e-5", "True", "'no'", "", "bf16-true", "1_000")]
    [4, 2e-05, True, 'no', None, 'bf16-true', 1000]
    """
    text = _TAG.sub("", text.strip())
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _NUMBER.fullmatch(text):
        number = text.replace("_", "")
        return int(number) if number.lstrip("+-").isdigit() else float(number)
    return text


def _of_brackets(text: str, path: str) -> Iterator[tuple[str, Value]]:
    """Yield the values of a list or a mapping in brackets."""
    inner, parts, depth, start = text[1:-1], [], 0, 0
    for place, each in enumerate(inner):
        depth += (each in "[{") - (each in "]}")
        if each == "," and not depth:
            parts.append(inner[start:place])
            start = place + 1
    parts = [each.strip() for each in [*parts, inner[start:]] if each.strip()]
    if text.startswith("["):
        plain = [str(_scalar(each)) for each in parts if each[0] not in "[{"]
        if plain:
            yield f"{path}[]", ", ".join(plain)
        return
    for each in parts:
        key, _, value = each.partition(":")
        name, value = f"{path}.{key.strip().strip(chr(34) + chr(39))}", value.strip()
        yield from _of_brackets(value, name) if value[:1] in ("[", "{") else [(name, _scalar(value))]


class _Yaml:
    """A YAML file, read line by line."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, Value] = {}
        self.places: dict[str, list[Place]] = {}
        self._open: list[tuple[int, str, bool]] = []
        """Columns of the keys and of the items around a line, with their paths; True for an item."""
        lines = text.splitlines()
        number = 0
        while number < len(lines):
            number = self._read(lines, number)

    def _read(self, lines: list[str], number: int) -> int:
        """Take in a line, and those that its value goes on to; return the next."""
        line = bare_line(lines[number])
        body = line.lstrip(" ")
        column = len(line) - len(body)
        if not body or body.startswith(("---", "...", "%")):
            return number + 1
        while body.startswith("- ") or body == "-":
            while self._open and (self._open[-1][0] > column or (self._open[-1][0] == column and self._open[-1][2])):
                self._open.pop()
            self._open.append((column, self._below("[]"), True))
            rest = body[1:].lstrip(" ")
            column, body = column + len(body) - len(rest), rest
        match = _YAML_KEY.match(body)
        if match is None:
            self._item(body)
            return number + 1
        while self._open and self._open[-1][0] >= column:
            self._open.pop()
        parent = self._open[-1][1] if self._open else ""
        name = match["key"].strip("\"'")
        path = self._below(f".{name}") if parent else name
        self._open.append((column, path, False))
        self._forget(parent)
        value = _TAG.sub("", body[match.end() :].strip() + " ").strip()
        place = Place(number, column, column + match.end(), len(line) if _is_plain(value) else 0)
        self.places.setdefault(path, []).append(place)
        return self._value(lines, number, column, path, value)

    def _forget(self, path: str) -> None:
        """Leave out the missing value of a key that has keys or items below it."""
        for each in (path, path.removesuffix("[]")):
            if self.values.get(each, "") is None:
                del self.values[each]

    def _below(self, name: str) -> str:
        return (self._open[-1][1] if self._open else "") + name

    def _item(self, body: str) -> None:
        """Take in a plain item of a list; the rest of a text is left out."""
        if body and self._open and self._open[-1][2]:
            path = self._open[-1][1]
            self._forget(path)
            known = self.values.get(path)
            self.values[path] = str(_scalar(body)) if known is None else f"{known}, {_scalar(body)}"

    def _value(self, lines: list[str], number: int, column: int, path: str, value: str) -> int:
        """Take in the value behind a key; return the next line."""
        if _BLOCK.fullmatch(value):
            number += 1
            while number < len(lines) and (not lines[number].strip() or _indent(lines[number]) > column):
                number += 1
            return number
        if value[:1] in ("'", '"') and not _is_closed(value):
            self.values[path] = value[1:]
            number += 1
            while number < len(lines) and not _is_closed(value[0] + lines[number].strip()):
                number += 1
        elif value[:1] in ("[", "{"):
            while _depth(value) > 0 and number + 1 < len(lines):
                number += 1
                value += " " + bare_line(lines[number]).strip()
            self.values |= dict(_of_brackets(value, path))
        else:
            self.values[path] = _scalar(value)
        return number + 1


def _is_closed(text: str) -> bool:
    """Return True if a text that a quotation mark opens ends on its line."""
    rest = text[1:].replace("\\\\", "").replace("\\" + text[0], "").replace("''", "")
    return text[0] in rest


def _is_plain(value: str) -> bool:
    """Return True for a value that stands on one line alone."""
    return bool(value) and value[0] not in "[{|>&*!" and (value[0] not in "'\"" or _is_closed(value))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _depth(text: str) -> int:
    return sum((each in "[{") - (each in "]}") for each in text)


def _places_in_toml(text: str) -> dict[str, list[Place]]:
    places: dict[str, list[Place]] = {}
    section = ""
    for number, whole in enumerate(text.splitlines()):
        line = bare_line(whole)
        if head := _SECTION.fullmatch(line):
            section = f"{head[1]}[]." if line.lstrip().startswith("[[") else f"{head[1]}."
        elif match := _TOML_KEY.match(line):
            value = line[match.end() :]
            is_plain = bool(value) and value[0] not in "[{" and not value.startswith(('"""', "'''"))
            place = Place(number, _indent(line), match.end(), len(line) if is_plain else 0)
            places.setdefault(section + match["key"].strip("\"'"), []).append(place)
    return places


def places_in(kind: str, text: str) -> dict[str, list[Place]]:
    """Return where the keys of a YAML or a TOML file stand, by their paths."""
    return _places_in_toml(text) if kind == "toml" else _Yaml(text).places


def _yaml(text: str) -> dict[str, Value]:
    return _Yaml(text).values


_READERS: Mapping[str, Callable[[str], dict[str, Value]]] = {
    "json": _json,
    "toml": _toml,
    "python": _python,
    "yaml": _yaml,
}
