"""What commands share: the help text of configuration keys, from the schema, and options that several take."""

import ast
import inspect
import json
from collections.abc import Collection, Iterator, Sequence

import msgspec

from tightfit.config import defaults
from tightfit.config.schema import Schema
from tightfit.errors import ConfigError


def keys_help(schema: type[Schema]) -> str:
    """A line a key: `--key=default` and what it means."""
    usual = defaults(schema)
    written = {key: f"--{key}={value!r}" for key, value in usual.items()}
    width = min(34, max(map(len, written.values())))
    return "\n".join(f"  {written[key]:<{width}}  {text}" for key, text in _sentences(schema) if key in usual)


def _sentences(schema: type[Schema]) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass with the string below each, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            yield field.target.id, inspect.cleandoc(ast.literal_eval(text.value)).replace("\n", " ")


_EXAMPLES = {"--lang": "en or ja", "--html": "page.html", "--gpu": "'RTX 3060 12GB'", "--used": "2GiB"}


def split_options(
    arguments: Sequence[str], options: Collection[str], flags: Collection[str] = ()
) -> tuple[dict[str, list[str]], set[str], list[str]]:
    """A command's own options with the values given, its flags, and all other words, which are the configuration's.

    >>> split_options(["--lang", "ja", "a.py", "--json", "--lr=1"], ["--lang"], ["--json"])
    ({'--lang': ['ja']}, {'--json'}, ['a.py', '--lr=1'])
    """
    values: dict[str, list[str]] = {}
    found: set[str] = set()
    rest, words = list[str](), list(arguments)
    while words:
        name, equals, value = (word := words.pop(0)).partition("=")
        if word in flags:
            found.add(word)
        elif name not in options:
            rest.append(word)
        elif value or (not equals and words):
            values.setdefault(name, []).append(value or words.pop(0))
        else:
            raise ConfigError(f"{name} needs a value; write {name}={_EXAMPLES.get(name, 'VALUE')}")
    return values, found, rest


def last(values: dict[str, list[str]]) -> dict[str, str]:
    """Of options that were given again, the last value."""
    return {name: each[-1] for name, each in values.items()}


def capability(text: str | None) -> tuple[int, int] | None:
    """The option --capability: a card's major and minor number, or None where it is not given."""
    if not text:
        return None
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ConfigError(f"--capability={text} must be two numbers with a point between them, such as 8.6")
    return int(major), int(minor)


def as_json(record: object) -> str:
    """Encode a record, or a list of them, for --json."""
    return json.dumps(msgspec.to_builtins(record), indent=2, ensure_ascii=False)
