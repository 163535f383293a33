"""What commands share: the help text of configuration keys, from the schema, and options that several take."""

import ast
import inspect
from collections.abc import Iterator

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


def capability(text: str | None) -> tuple[int, int] | None:
    """The option --capability: a card's major and minor number, or None where it is not given."""
    if not text:
        return None
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ConfigError(f"--capability={text} must be two numbers with a point between them, such as 8.6")
    return int(major), int(minor)
