"""Values of a configuration file by their dotted paths, with the places where they stand: JSON, TOML, YAML, Python."""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

Value = bool | int | float | str | None


class Place(NamedTuple):
    """The column of a key, and its value between two characters of the text."""

    column: int
    start: int
    end: int
    kind: str
    """plain, block or flow; empty for a value that is left alone: an alias, a text behind | or >."""


_YAML_KEY = re.compile(r"(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s#&*!|>'\"%@`{\[\]},:?-][^#:\n]*?|-[\w-]+)\s*:(?=\s|$)")
_TOML_KEY = re.compile(r"[ \t]*(?P<key>[\w.\"'-]+)[ \t]*=[ \t]*")
_SECTION = re.compile(r"[ \t]*\[{1,2}[ \t]*([\w.\"' -]+?)[ \t]*\]{1,2}")
_COMMENT = re.compile(r"(?:^|(?<=\s))#[^\n]*")
_EXPONENT = re.compile(r"[+-]?(?:\d[\d_]*)?\.?\d+[eE][+-]?\d+")
_MOST_NODES = 200_000


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


_OF_SETTINGS = re.compile(r"(?:Arguments|Config|Args)$")
"""Ends of names of classes that hold a run's settings, such as TrainingArguments."""


def _of_node(node: ast.expr, path: str) -> Iterator[tuple[str, Value]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        for keyword in node.keywords:
            if keyword.arg:
                yield from _of_node(keyword.value, f"{path}.{keyword.arg}")
    elif isinstance(node, ast.Call) and _OF_SETTINGS.search(ast.unparse(node.func)):
        for keyword in node.keywords:
            if keyword.arg:
                yield from _of_node(keyword.value, keyword.arg)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield from _of_node(value, f"{path}.{key.value}")
    elif isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool | int | float | str)):
        yield path, node.value


class Yaml:
    """A YAML file as PyYAML's nodes have it; a tag makes no object."""

    def __init__(self, text: str) -> None:
        import yaml  # most runs of `tightfit explain` read none

        self.values: dict[str, Value] = {}
        self.places: dict[str, list[Place]] = {}
        self.loader: Any = None
        self.error: yaml.YAMLError | None = None
        self._seen: set[int] = set()
        self._left = _MOST_NODES
        try:
            self.loader = yaml.SafeLoader(text)
            while self.loader.check_node():
                document = self.loader.get_node()
                self._place(document, "")
                self.values |= flat(self._plain(document)) if document.id != "scalar" else {}
        except yaml.YAMLError as error:
            self.values, self.error = {}, error
        except RecursionError:
            self.values = {}

    def _place(self, node: Any, path: str) -> None:
        """Take in the places of the keys below a node; what an alias repeats has the place of its anchor alone."""
        self._seen.add(id(node))
        if node.id == "sequence":
            for each in node.value:
                if id(each) not in self._seen:
                    self._place(each, f"{path}[]")
        for key, value in node.value if node.id == "mapping" else ():
            if key.id == "scalar":
                name = f"{path}.{key.value}" if path else key.value
                is_alias = id(value) in self._seen
                kind = "" if is_alias else self._kind(value)
                place = Place(key.start_mark.column, value.start_mark.index, value.end_mark.index, kind)
                self.places.setdefault(name, []).append(place)
                if not is_alias:
                    self._place(value, name)

    @staticmethod
    def _kind(node: Any) -> str:
        if node.id != "scalar":
            return "flow" if node.flow_style else "block"
        return "" if node.style in ("|", ">") else "plain"

    def _plain(self, node: Any) -> object:
        """Return a node as mappings, lists and values; RecursionError where aliases of aliases have no end."""
        self._left -= 1
        if self._left < 0:
            raise RecursionError
        if node.id == "scalar":
            return self._scalar(node)
        if node.id == "sequence":
            return [self._plain(each) for each in node.value]
        self.loader.flatten_mapping(node)
        return {key.value: self._plain(value) for key, value in node.value if key.id == "scalar"}

    def _scalar(self, node: Any) -> Value:
        """Return a value as PyYAML reads it, and 2e-5 as the number that it is in JSON and YAML 1.2."""
        kind = node.tag.rpartition(":")[2]
        try:
            if kind in ("null", "bool", "int"):
                return self.loader.construct_object(node)  # type: ignore[no-any-return]
            if kind == "float" or (node.style is None and _EXPONENT.fullmatch(node.value)):
                return float(node.value.replace("_", ""))
        except (ValueError, LookupError):  # .inf, or a tag for another kind of value
            pass
        text: str = node.value.rstrip("\n") if node.style in ("|", ">") else node.value
        return text if text or node.style else None


@lru_cache(maxsize=8)
def yaml_in(text: str) -> Yaml:
    """Return what a YAML file has.

    >>> yaml_in("a: &x {b: 2e-5}\\nc: {<<: *x, d: [!t e, yes]}\\n").values
    {'a.b': 2e-05, 'c.b': 2e-05, 'c.d[]': 'e, True'}
    """
    return Yaml(text)


def _places_in_toml(text: str) -> dict[str, list[Place]]:
    places: dict[str, list[Place]] = {}
    section, offset = "", 0
    for whole in text.splitlines(keepends=True):
        line = bare_line(whole)
        if head := _SECTION.fullmatch(line):
            section = f"{head[1]}[]." if line.lstrip().startswith("[[") else f"{head[1]}."
        elif match := _TOML_KEY.match(line):
            value = line[match.end() :]
            is_plain = bool(value) and value[0] not in "[{" and not value.startswith(('"""', "'''"))
            start, end = offset + match.end(), offset + len(line)
            place = Place(match.start("key"), start, end, "plain" if is_plain else "")
            places.setdefault(section + match["key"].strip("\"'"), []).append(place)
        offset += len(whole)
    return places


def places_in(kind: str, text: str) -> dict[str, list[Place]]:
    """Return where the keys of a YAML or a TOML file stand, by their paths."""
    return _places_in_toml(text) if kind == "toml" else yaml_in(text).places


def _yaml(text: str) -> dict[str, Value]:
    return dict(yaml_in(text).values)


_READERS: Mapping[str, Callable[[str], dict[str, Value]]] = {
    "json": _json,
    "toml": _toml,
    "python": _python,
    "yaml": _yaml,
}
